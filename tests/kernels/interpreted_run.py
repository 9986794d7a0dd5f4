"""Runs the checks of ``interpreted/`` in a process of its own, where Triton interprets kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_interpreted(name: str, at_least: int) -> None:
    """Fail unless ``interpreted/NAME`` passes, with no fewer checks than ``at_least``."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            # The interpreter warns at every operation.
            "-p",
            "no:warnings",
            "--override-ini=python_files=check_*.py",
            str(HERE / "interpreted" / name),
        ],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    counted = re.search(r"^(\d+) passed in ", done.stdout, re.MULTILINE)
    assert counted and int(counted[1]) >= at_least, done.stdout[-2000:]
