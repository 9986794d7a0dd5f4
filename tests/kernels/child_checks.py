"""Runs checks (``check_*.py``) by pytest in a process of their own, as Triton may need one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_checks(path: Path, at_least: int, **environment: str) -> None:
    """Fail unless the checks of a file or folder pass, with no fewer than ``at_least``.

    Args:
        environment: Variables of the process, besides those that hide GPUs and keep to one core.
    """
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
            str(path),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            # vLLM turns Triton off where no GPU driver is active, unless no GPU is to be seen.
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    counted = re.search(r"^(\d+) passed in ", done.stdout, re.MULTILINE)
    assert counted and int(counted[1]) >= at_least, done.stdout[-2000:]
