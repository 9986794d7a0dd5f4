"""What the checks of interpreted kernels share."""

from __future__ import annotations

import numpy as np
import pytest
from triton.runtime import interpreter as triton_interpreter


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Every address that a load or a store forms, masked-off lanes too, an array an access."""
    formed: list[np.ndarray] = []
    builder = triton_interpreter.interpreter_builder

    def watch(name: str) -> None:
        real = getattr(builder, name)

        def watching(ptrs, *args, **kwargs):
            formed.append(np.array(ptrs.data, dtype=np.uint64).ravel())
            return real(ptrs, *args, **kwargs)

        monkeypatch.setattr(builder, name, watching)

    watch("create_masked_load")
    watch("create_masked_store")
    return formed
