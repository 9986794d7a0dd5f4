"""An SM120 GPU for the operations: they launch on the emulator, with tensors of the CPU."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from emulator.driver import EmulatedDriver, emulated

import vllm_sm12x.ops
from vllm_sm12x import lowering
from vllm_sm12x.ops import launching

CAPABILITY = (12, 0)
MULTIPROCESSORS = 188  # an RTX PRO 6000's


@contextmanager
def emulated_gpu(traffic: bool = False) -> Iterator[EmulatedDriver]:
    """Operations take tensors of the CPU for a GPU's.

    Args:
        traffic: Whether to count what accesses to memory take, which is slow.
    """
    with ExitStack() as stack:
        lowering.clear_cache()
        stand_ins = [
            (launching.capability_of, lambda name, tensor, kernel: CAPABILITY),
            (lowering.multiprocessors, _Cached(MULTIPROCESSORS)),
            (lowering._current_capability, _Cached(CAPABILITY)),
        ]
        for function, stand_in in stand_ins:
            for names in _namespaces(function):
                stack.enter_context(patch.dict(names, {function.__name__: stand_in}))
        yield stack.enter_context(emulated(CAPABILITY, lowering.SHARED_MEMORY_LIMIT, traffic))
    lowering.clear_cache()


def _namespaces(function: Callable) -> Iterator[dict[str, object]]:
    """Of the modules of operations, and of the lowering's, that have a function by its name."""
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(vllm_sm12x.ops.__path__, "vllm_sm12x.ops.")
    ]
    for module in (lowering, *modules):
        if vars(module).get(function.__name__) is function:
            yield vars(module)


class _Cached:
    """A function that gives one value, with a cache to clear."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __call__(self) -> object:
        return self._value

    def cache_clear(self) -> None:
        pass
