"""Launches that find their compiled kernel at once.

Triton finds it anew at every launch: it sorts the arguments into kinds, makes text of the options
and compares every global constant that the kernel uses with what it was. On the host that takes ten
times as long as the launch itself. Where attention runs between CUDA graphs (drafting, prefill),
a step is bound by exactly that.

:func:`launch` remembers what Triton compiled for a launch and hands the next one like it straight
to the compiled kernel. Alike are launches of which the compiler cannot tell the arguments apart,
and more: the same integers, pointers to the same types and aligned alike, the same constants and
options, the same GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_sm12x.ops.launching import compiles_only

# Triton compiles other kernels for pointers to multiples of this.
_ALIGNMENT = 16

# Batches of any size pass here, each with integers of its own: so many launches are remembered.
_MOST = 4096

_found: dict[tuple[object, ...], tuple[CompiledKernel, tuple[object, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, int, int], *arguments: object, **options: object) -> None:
    """``kernel[grid](*arguments, **options)``, quicker from the second time on.

    Args:
        kernel: A function under ``triton.jit`` or ``gluon.jit``.
        grid: Programs in three dimensions.
        arguments: Those of the kernel's parameters that are no ``constexpr``, all of them and in
            order: tensors, numbers and None.
        options: The ``constexpr`` parameters, which come last in the kernel's signature, and what
            Triton's launch takes besides, such as ``num_warps``.
    """
    # Triton's interpreter, too, is to have every launch.
    if compiles_only() or not isinstance(kernel, JITFunction):
        kernel[grid](*arguments, **options)
        return
    kinds = _kinds(arguments)
    key = (id(kernel), driver.active.get_current_device(), *kinds, *options.items())
    found = _found.get(key)
    if found is not None:
        compiled, constants = found
        compiled[grid](*arguments, *constants)
        return
    compiled = kernel[grid](*arguments, **options)
    # None comes back where something stands in Triton's place and compiles nothing.
    if isinstance(compiled, CompiledKernel):
        if len(_found) >= _MOST:
            _found.clear()
        names = kernel.arg_names[len(arguments) :]
        _found[key] = compiled, tuple(options[name] for name in names)


def clear_cache() -> None:
    """Forget every launch, for tests."""
    _found.clear()


def _kinds(arguments: tuple[object, ...]) -> list[object]:
    """What tells each argument from others, for the compiler; equal only where that is.

    No kernel is compiled for a certain fraction. True is another word than 1, which it equals.
    """
    return [
        argument
        if (sort := type(argument)) is int or argument is None
        else (argument.dtype, argument.data_ptr() % _ALIGNMENT)
        if isinstance(argument, torch.Tensor)
        else sort
        if sort is float
        else (sort, argument)
        for argument in arguments
    ]
