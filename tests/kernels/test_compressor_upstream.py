"""What vLLM's Triton compressors compile to, which is why C128A's has a kernel of ours."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict[str, object]]:
    """Rows of ``benchmarks.compressor.upstream`` for the keys; vLLM must import it afresh."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("SM12X_LOWERING", None)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compressor.upstream", "--json", "--only", "keys"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines]


def test_the_long_window_spills(rows):
    """Once it does not, the patch that routes C128A to our kernel can be dropped."""
    found = {row["target"]: row for row in rows if row["kernel"] == "keys, C128A"}
    assert set(found) == {"sm_120a", "sm_121a"}
    for row in found.values():
        assert row["stack"] > 4096, row
        assert row["STL"] > 1000 and row["LDL"] > 1000, row


def test_the_short_window_does_not(rows):
    found = [row for row in rows if row["kernel"] == "keys, C4A"]
    assert len(found) == 2
    for row in found:
        assert (row["stack"], row["STL"], row["LDL"]) == (0, 0, 0), row
        assert row["shared"] <= 101_376
