"""Every check here also fails where a kernel forms an address outside the tensors it was given."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from triton.runtime import interpreter as triton_interpreter

# Where pointers and mask stand in the interpreter's operations on memory.
_OPERATIONS = {
    "create_masked_load": (0, 1),
    "create_masked_store": (0, 2),
    "create_atomic_cas": (0, None),
    "create_atomic_rmw": (1, 3),
}


def _tensors(values: Iterable[object]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor, and the one past its last element."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@pytest.fixture(autouse=True)
def every_address_is_inside_a_tensor(monkeypatch):
    """Also those of lanes that are masked off. An empty tensor has none; there the others count."""
    spans: list[tuple[int, int]] = []
    call = triton_interpreter.GridExecutor.__call__

    def launched(self, *args, **kwargs):
        spans[:] = [_span(tensor) for tensor in _tensors((*args, *kwargs.values()))]
        return call(self, *args, **kwargs)

    def watch(name: str, position: int, mask: int | None) -> None:
        builder = triton_interpreter.interpreter_builder
        real = getattr(builder, name)

        def watching(*args, **kwargs):
            pointers = args[position]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            formed = pointers.data.astype(np.uint64)
            lowest, highest = int(formed.min()), int(formed.max()) + size
            if any(first <= lowest and highest <= end for first, end in spans):
                return real(*args, **kwargs)
            inside = np.zeros(formed.shape, dtype=bool)
            for first, end in spans:
                inside |= (formed >= first) & (formed + np.uint64(size) <= end)
            if mask is not None and any(first == end for first, end in spans):
                inside |= ~args[mask].data.astype(bool)
            assert inside.all(), f"{name}: {(~inside).sum()} of {inside.size} addresses are outside"
            return real(*args, **kwargs)

        monkeypatch.setattr(builder, name, watching)

    monkeypatch.setattr(triton_interpreter.GridExecutor, "__call__", launched)
    for name, (position, mask) in _OPERATIONS.items():
        watch(name, position, mask)
