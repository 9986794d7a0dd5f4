"""The checks here import their helpers by name, and the recorder of the kernel tests."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

sys.path[:0] = [str(HERE), str(HERE.parents[1] / "kernels"), str(HERE.parents[1] / "engine")]
