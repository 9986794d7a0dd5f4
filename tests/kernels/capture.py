"""Watches an operation as a CUDA-graph capture would, on the CPU; on a GPU, captures it.

Under capture nothing may depend on data: no value may travel to the host, no shape may follow from
values, and the launches must be the same whatever the tensors hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Each of these brings a value to the host, or makes a shape from values, or uploads a host tensor.
FORBIDDEN = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::histc",
    "aten::repeat_interleave",
    "aten::lift_fresh",
}


class Recorder(TorchDispatchMode):
    """Fails on what a capture forbids; records the launches and the most memory held at a time.

    Args:
        inputs: Tensors that exist before; their memory is not counted.
    """

    def __init__(self, inputs: Iterable[Any]) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[tuple[int, ...], ...]]] = []
        self.peak_bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._inputs = {
            leaf.untyped_storage()._cdata for leaf in inputs if isinstance(leaf, torch.Tensor)
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name not in FORBIDDEN, f"{name} is not safe under CUDA-graph capture"
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            for index in args[1]:
                assert index is None or index.dtype not in (torch.bool, torch.uint8), (
                    f"{name} with a mask is not safe under CUDA-graph capture"
                )
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.calls.append((name, tuple(tuple(tensor.shape) for tensor in tensors)))
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._inputs and storage._cdata not in self._live:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._live.values()))
        return result


def record(call: Callable[..., object], *inputs: object, **keywords: object) -> Recorder:
    """Run ``call(*inputs, **keywords)`` under a :class:`Recorder`."""
    with Recorder([*inputs, *keywords.values()]) as recorder:
        call(*inputs, **keywords)
    return recorder


def replay_on_gpu(
    call: Callable[..., object], first: dict[str, Any], second: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Capture ``call(**first)`` in a CUDA graph, put the values of ``second`` in place, replay.

    Args:
        first: Keywords of the call; tensors are on the CPU, of any strides.
        second: The same with other values; shapes, strides and storage sizes are equal.

    Returns:
        What the call returned and the keywords after the replay, tensors on the CPU.
    """
    static = {name: copy_of(value, "cuda") for name, value in first.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(**static)  # libraries initialise themselves outside the capture
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(**static)
    for name, value in second.items():
        if isinstance(value, torch.Tensor):
            storage_bytes(static[name]).copy_(storage_bytes(value))
    graph.replay()
    torch.cuda.synchronize()
    after = {name: copy_of(value, "cpu") for name, value in static.items()}
    return copy_of(result, "cpu"), after


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def copy_of(value: Any, device: str) -> Any:
    """A copy on ``device`` with the same strides, gaps included."""
    if not isinstance(value, torch.Tensor):
        return value
    storage = storage_bytes(value).to(device, copy=True).untyped_storage()
    copy = torch.empty(0, dtype=value.dtype, device=device)
    return copy.set_(storage, value.storage_offset(), value.size(), value.stride())
