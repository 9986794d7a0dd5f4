"""Kernel tests: ``tolerance`` and its like import by name; GPU tests are skipped without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

# An installed wheel is tested as installed; a bare checkout is tested in place.
if importlib.util.find_spec("vllm_sm12x") is None:
    sys.path.insert(0, str(HERE.parents[1] / "kernels"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")


@pytest.fixture(autouse=True)
def the_reference_unless_a_kernel_is_asked_for(monkeypatch):
    """So that a test means the same whichever kernels run by default on the GPU at hand."""
    from vllm_sm12x import implementation

    monkeypatch.setenv(implementation.ENV, "none")
    implementation.clear_cache()
    yield
    implementation.clear_cache()


@pytest.fixture(params=["native", "sm120"])
def lowered(request):
    """Each test once in the GPU's own lowering, and once in that of SM12x."""
    from vllm_sm12x import lowering

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(lowering.ENV, request.param)
        lowering.clear_cache()
        yield request.param
    lowering.clear_cache()
