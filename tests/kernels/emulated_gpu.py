"""An SM12x GPU for the operations: they launch on the emulator, with tensors of the CPU."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from emulator.driver import EmulatedDriver, Span, emulated
from launch_keys import Cached

import vllm_sm12x.ops
from vllm_sm12x import implementation, lowering
from vllm_sm12x.ops import launching

CAPABILITY = (12, 0)
# Of an RTX PRO 6000 and a GB10.
MULTIPROCESSORS = {(12, 0): 188, (12, 1): 48}


@contextmanager
def emulated_gpu(
    capability: tuple[int, int] = CAPABILITY,
    traffic: bool = False,
    every_kernel: bool = False,
    span: Span | None = None,
) -> Iterator[EmulatedDriver]:
    """Operations take tensors of the CPU for a GPU's.

    Args:
        capability: Of the GPU, a key of :data:`MULTIPROCESSORS`.
        traffic: Whether to count what accesses to memory take, which is slow.
        every_kernel: Whether an operation runs its kernel where the caller does not say which form
            it wants, as with ``SM12X_KERNELS=all``.
        span: What of a tensor's memory a kernel may touch, as in :func:`emulator.driver.emulated`.
    """
    stand_ins = {
        (launching, "capability_of"): lambda name, tensor, kernel: capability,
        (lowering, "multiprocessors"): Cached(MULTIPROCESSORS[capability]),
        (lowering, "_current_capability"): Cached(capability),
    }
    if every_kernel:
        choose = implementation.choose
        stand_ins[implementation, "choose"] = lambda operation, asked, on_gpu: choose(
            operation, asked or "triton", on_gpu
        )
    with ExitStack() as stack:
        lowering.clear_cache()
        for (module, name), stand_in in stand_ins.items():
            for names in _namespaces(name, vars(module)[name]):
                stack.enter_context(patch.dict(names, {name: stand_in}))
        yield stack.enter_context(emulated(capability, lowering.SHARED_MEMORY_LIMIT, traffic, span))
    lowering.clear_cache()


def _namespaces(name: str, function: Callable) -> Iterator[dict[str, object]]:
    """Of the modules that have a function by this name, those of operations among them."""
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(vllm_sm12x.ops.__path__, "vllm_sm12x.ops.")
    ]
    for module in (lowering, implementation, *modules):
        if vars(module).get(name) is function:
            yield vars(module)
