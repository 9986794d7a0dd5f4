"""vLLM's Triton compressors at the first window, in Triton's interpreter (see ``interpreted/``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from child_checks import run_checks


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_the_kernels_are_right_and_stay_inside_their_tensors():
    path = Path(__file__).parent / "interpreted" / "check_compressor_addresses.py"
    run_checks(path, at_least=8, TRITON_INTERPRET="1", SM12X_PORTABLE="all")
