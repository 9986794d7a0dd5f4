"""Every test here launches on the emulator: what Triton compiles for SM12x runs, and is checked."""

from __future__ import annotations

import os

import pytest
import torch
from emulated_gpu import emulated_gpu
from emulator.driver import EmulatedDriver

from vllm_sm12x import lowering

# vLLM does without Triton where it finds no GPU's driver, unless no GPU is to be seen.
if not torch.cuda.is_available():
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True)
def gpu(monkeypatch) -> EmulatedDriver:
    """An SM120 GPU, whose memory is the CPU's."""
    monkeypatch.delenv(lowering.ENV, raising=False)
    with emulated_gpu() as driver:
        yield driver
