"""Ring 1: the patched engine, started for real, on the portable path."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.gpu
@pytest.mark.parametrize(("kernels", "lowering"), [("none", "auto"), ("all", "sm120")])
@pytest.mark.parametrize("mtp", [0, 2])
def test_the_portable_path_answers_requests(mtp, kernels, lowering, tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, str(HERE / "run_engine.py"), "--mtp", str(mtp), "--out", str(report)]
    command += ["--kernels", kernels, "--lowering", lowering]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    checks = json.loads(report.read_text())["checks"]
    assert len(checks) == 21
    assert all(row["holds"] for row in checks)


@pytest.mark.gpu
@pytest.mark.slow
def test_drafting_changes_no_answer(tmp_path):
    command = [sys.executable, str(HERE / "compare_drafting.py"), str(tmp_path)]
    command += ["--kernels", "all", "--lowering", "sm120"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=7200)
    assert done.returncode == 0, done.stdout[-6000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["runs"]) == 12
    assert not report["not_run"]
