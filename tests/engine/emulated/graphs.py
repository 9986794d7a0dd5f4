"""CUDA graphs: what a step did is recorded, and done again with the same memory.

A replay knows no Python: it runs PyTorch's operations, Triton's kernels and vLLM's compiled
operations with the tensors and numbers of the capture. What the model would decide anew in Python,
a graph has fixed, and so it is here. To look at a number on the CPU while a graph is captured is an
error, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

Step = Callable[[], None]

_EMPTY = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
}


class CUDAGraph:
    """As ``torch.cuda.CUDAGraph``."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.steps: list[Step] = []

    def replay(self) -> None:
        """Do what was recorded."""
        with torch.inference_mode():
            for step in self.steps:
                step()

    def reset(self) -> None:
        """Forget it."""
        self.steps.clear()


class CaptureError(RuntimeError):
    """What a captured step may not do."""


class capture(TorchDispatchMode):
    """As ``torch.cuda.graph``."""

    # The capture that is under way, and whether a call runs that it sees as a whole.
    current: capture | None = None
    in_call = False

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, **named: Any
    ) -> None:
        super().__init__()
        self._steps = cuda_graph.steps
        self._patches = ExitStack()
        self._depth = 0

    def __enter__(self) -> capture:
        self._depth += 1
        if self._depth == 1:
            capture.current = self
            for name in ("tolist", "numpy"):
                self._patches.enter_context(patch.object(torch.Tensor, name, _looking(name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            capture.current = None
            self._patches.close()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function.namespace not in ("aten", "prims"):
            # One of vLLM's: what it does is recorded, and not that it was called.
            with self:
                return function._op_dk(torch._C.DispatchKey.CPU, *arguments, **named)
        # Of what PyTorch has as several operations, each is seen.
        with self:
            result = function.decompose(*arguments, **named)
        if result is not NotImplemented:
            return result
        if _waits(function, arguments):
            raise CaptureError(f"{function}: looks at a number while a graph is captured")
        result = function(*arguments, **named)
        if function._schema.is_mutable or _has_new_numbers(function, arguments, named, result):
            self.add(lambda: function(*arguments, **named), result)
        return result

    def add(self, call: Callable[[], Any], result: Any) -> None:
        """Record a call; what it gives is to lie where ``result`` lies."""
        tensors = [leaf for leaf in tree_leaves(result) if _is_tensor(leaf)]

        def step() -> None:
            again = [leaf for leaf in tree_leaves(call()) if _is_tensor(leaf)]
            for old, new in zip(tensors, again, strict=True):
                if old is not new and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self._steps.append(step)


def record(call: Callable[[], Any]) -> Any:
    """Do something that PyTorch does not see, such as a launch; once more in every replay."""
    if capture.current is None:
        return call()
    with _disable_current_modes(), patch.object(capture, "in_call", True):
        result = call()
    capture.current.add(call, result)
    return result


def _waits(function: Any, arguments: Any) -> bool:
    """Whether the CPU must know numbers to go on."""
    if function.overloadpacket is torch.ops.aten.index:
        # By a mask; by positions it need not.
        return any(one is not None and one.dtype == torch.bool for one in arguments[1])
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return not tags.isdisjoint(function.tags)


def _has_new_numbers(function: Any, arguments: Any, named: Any, result: Any) -> bool:
    """Whether a result is neither another name for an operand's memory nor without numbers."""
    if function.overloadpacket in _EMPTY:
        return False
    given = {memory_of(leaf) for leaf in tree_leaves((arguments, named)) if _is_tensor(leaf)}
    return any(memory_of(leaf) not in given for leaf in tree_leaves(result) if _is_tensor(leaf))


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def memory_of(tensor: torch.Tensor) -> int:
    """Where the memory begins that a tensor is a part of."""
    return tensor.untyped_storage().data_ptr()


def _looking(name: str) -> Callable[..., Any]:
    """A method of tensors that gives numbers to the CPU; an error where a capture would see it."""
    method = getattr(torch.Tensor, name)

    def look(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        if not capture.in_call:
            raise CaptureError(f"{name}: looks at a tensor's numbers while a graph is captured")
        return method(tensor, *arguments, **named)

    return look
