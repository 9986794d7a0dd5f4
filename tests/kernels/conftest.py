"""Paths for the kernel tests: ``tolerance`` and its like import by name from any test here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

# An installed wheel is tested as installed; a bare checkout is tested in place.
if importlib.util.find_spec("vllm_sm12x") is None:
    sys.path.insert(0, str(HERE.parents[1] / "kernels"))
