"""What a CUDA graph cannot capture, caught on the CPU.

An operation that reads a value back from the device, or whose shapes follow from values, breaks a
capture. It shows in the operators that PyTorch dispatches, on any device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that wait for the device, size their result by values, or copy from the host.
FORBIDDEN = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "nonzero_static",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
}
MASK_DTYPES = (torch.bool, torch.uint8)


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in FORBIDDEN, f"{name} cannot be captured in a CUDA graph"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in MASK_DTYPES]
            assert not masks, f"{name} with a mask cannot be captured in a CUDA graph"
        result = func(*args, **(kwargs or {}))
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        self.operations.append((name, shapes))
        return result


def operations_of(call: Callable[[], object]) -> list[tuple]:
    """Operators that ``call`` dispatches, with the shapes of their results.

    Two calls that differ in values alone must give the same list, or a replay of the one would not
    do the work of the other.

    Raises:
        AssertionError: One of them cannot be captured.
    """
    with _Watch() as watch:
        call()
    return watch.operations
