"""How kernels are compiled without being launched, and what operations ask before they launch.

Inside :func:`compile_only` an operation runs on tensors that have no memory, on the ``meta``
device: its own code finds the launch parameters and arguments, and a kernel is compiled for them
and not launched. What is compiled is so what the operation launches later, with equal shapes,
strides, types and alignment. Nobody need know of it, neither our operations nor functions of vLLM
and others that launch Triton's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.runtime.jit import JITFunction

# To a pointer's multiple of which Triton compiles another kernel than to others.
_ALIGNMENT = 16


@dataclass
class Compilation:
    """What :func:`compile_only` compiles.

    Attributes:
        capability: Of the GPU that is compiled for.
        kernels: What Triton gave for each launch, in their order: a compiled kernel, or the promise
            of one where compilations run beside each other.
    """

    capability: tuple[int, int]
    kernels: list[Any] = field(default_factory=list)


_compilation: ContextVar[Compilation | None] = ContextVar("compilation", default=None)


@contextmanager
def compile_only(capability: tuple[int, int]) -> Iterator[Compilation]:
    """Compile in place of launching, for Triton's current GPU, in this thread.

    That holds for every ``kernel[grid](...)``, whoever's code it is in.

    Args:
        capability: Of that GPU.
    """
    compilation = Compilation(capability)
    token = _compilation.set(compilation)
    run = JITFunction.run

    def compile_or_run(
        kernel: JITFunction, *arguments: object, warmup: bool, **options: object
    ) -> Any:
        # Other threads launch as ever.
        if warmup or _compilation.get() is not compilation:
            return run(kernel, *arguments, warmup=warmup, **options)
        compilation.kernels.append(run(kernel, *arguments, warmup=True, **options))
        return None

    JITFunction.run = compile_or_run
    try:
        yield compilation
    finally:
        JITFunction.run = run
        _compilation.reset(token)


def compiles_only() -> bool:
    """Whether :func:`compile_only` is at work here: a launch compiles, and must reach Triton."""
    return _compilation.get() is not None


def capability_of(name: str, tensor: torch.Tensor, kernel: str) -> tuple[int, int]:
    """Capability of the GPU that a tensor is on, or that is compiled for.

    Args:
        name: The argument's, for the error.
        kernel: What the error calls the kernel, such as ``"Triton einsum kernel"``.

    Raises:
        ValueError: The tensor is on no GPU.
    """
    if tensor.is_cuda:
        return torch.cuda.get_device_capability(tensor.device)
    compilation = _compilation.get()
    if compilation is not None:
        return compilation.capability
    raise ValueError(f"{name}: device {tensor.device}, allowed in the {kernel}: cuda")


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without memory that a launch cannot tell from ``tensor``.

    It has its shape, strides, dtype and alignment to 16 bytes, and lies on the ``meta`` device.
    """
    offset = tensor.data_ptr() % _ALIGNMENT // tensor.element_size()
    extent = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    elements = offset + (extent + 1 if tensor.numel() else 0)
    memory = torch.empty(elements, dtype=tensor.dtype, device="meta")
    return memory.as_strided(tensor.shape, tensor.stride(), offset)


def one_of_each(numbers: Iterable[int], kind: Callable[[int], Hashable]) -> list[int]:
    """The first number of each kind, in their order."""
    found: dict[Hashable, int] = {}
    for number in numbers:
        found.setdefault(kind(number), number)
    return list(found.values())
