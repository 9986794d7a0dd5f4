"""Every test here launches on the emulator: what Triton compiles for SM12x runs, and is checked."""

from __future__ import annotations

import importlib
import os
import pkgutil

import pytest
import torch
from emulator.driver import EmulatedDriver, emulated

import vllm_sm12x.ops
from vllm_sm12x import lowering
from vllm_sm12x.ops import launching

# vLLM does without Triton where it finds no GPU's driver, unless no GPU is to be seen.
if not torch.cuda.is_available():
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

CAPABILITY = (12, 0)
MULTIPROCESSORS = 188  # an RTX PRO 6000's


@pytest.fixture(autouse=True)
def gpu(monkeypatch) -> EmulatedDriver:
    """An SM120 GPU, whose memory is the CPU's."""
    monkeypatch.delenv(lowering.ENV, raising=False)
    lowering.clear_cache()
    _everywhere(monkeypatch, launching.capability_of, lambda name, tensor, kernel: CAPABILITY)
    _everywhere(monkeypatch, lowering.multiprocessors, _Cached(MULTIPROCESSORS))
    monkeypatch.setattr(lowering, "multiprocessors", _Cached(MULTIPROCESSORS))
    monkeypatch.setattr(lowering, "_current_capability", _Cached(CAPABILITY))
    with emulated(CAPABILITY, lowering.SHARED_MEMORY_LIMIT) as driver:
        yield driver


def _everywhere(monkeypatch, function, stand_in) -> None:
    """Put a function in the place of another, wherever an operation has it by that name."""
    for module in pkgutil.walk_packages(vllm_sm12x.ops.__path__, "vllm_sm12x.ops."):
        names = vars(importlib.import_module(module.name))
        if names.get(function.__name__) is function:
            monkeypatch.setitem(names, function.__name__, stand_in)


class _Cached:
    """A function of no arguments that gives one value, with a cache to clear."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __call__(self) -> object:
        return self._value

    def cache_clear(self) -> None:
        pass
