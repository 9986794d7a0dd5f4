"""Every check here runs twice: with our operations in plain PyTorch, and as their kernels.

All kernels of Triton's, vLLM's and ours, run on the emulator of ``tests/kernels``, as an SM120's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, params=["reference", "kernels"])
def gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """The GPU, and the form of the operations that are not asked for one."""
    from emulated_gpu import emulated_gpu

    with emulated_gpu(every_kernel=request.param == "kernels"):
        yield
