"""What holds for every part: the wheel is tested as installed, GPU tests only with a GPU."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path

import pytest

# Set by tests/rings for the parts that test the wheel.
INSTALLED = "TEST_INSTALLED_WHEEL"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Stop where ``vllm`` or ``vllm_sm12x`` would not come from the installed wheel."""
    if os.environ.get(INSTALLED) != "1":
        return
    site = Path(sysconfig.get_path("purelib")).resolve()
    for name in ("vllm", "vllm_sm12x"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or not origin.is_relative_to(site):
            pytest.exit(f"{name} comes from {origin}, not from the wheel in {site}", returncode=3)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``gpu`` where torch sees no GPU, as in ring 0."""
    if item.get_closest_marker("gpu") is not None:
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
