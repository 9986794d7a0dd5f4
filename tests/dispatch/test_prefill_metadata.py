"""The kernel of the prefill metadata, in Triton's interpreter (see ``interpreted/``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from child_checks import run_checks


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_the_kernel_is_right_and_stays_inside_its_tensors():
    path = Path(__file__).parent / "interpreted" / "check_prefill_metadata.py"
    run_checks(path, at_least=14, TRITON_INTERPRET="1", SM12X_PORTABLE="all")
