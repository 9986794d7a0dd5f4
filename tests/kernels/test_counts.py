"""The table of what kernels execute: its figures by hand where they can be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def counted(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.counts", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_einsums_rows(tmp_path):
    done = counted("--op", "fp8_einsum", "--out", str(tmp_path / "rows.jsonl"), "--commit", "c")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["shape"].split()[0] for row in rows] == ["1", "24", "128"]
    for row in rows:
        tokens = int(row["shape"].split()[0])
        # 2 groups of 512 x 1024 weights; an instruction multiplies 16 x 8 x 32.
        products = 2 * 512 * 1024 * max(tokens, 8)
        assert row["programs"] * row["matrix"] >= products // (16 * 8 * 32)
        # The weights, a byte each, are read by somebody: 32 bytes a sector.
        assert row["programs"] * row["global"] >= 2 * 512 * 1024 // 32
        assert row["shared_x"] >= 1 and row["global_x"] >= 1
        assert row["machine"].startswith("emulated SM120") and row["commit"] == "c"
    # Eight tokens are the least that an instruction takes.
    assert rows[0]["programs"] * rows[0]["matrix"] == 2 * 512 * 1024 * 8 // (16 * 8 * 32)
    for column in ("barriers", "shared_x", "bound"):
        assert column in done.stdout


def test_an_operation_that_is_none():
    done = counted("--op", "einsum")
    assert done.returncode == 2
    assert "--op: 'einsum', allowed: sparse_mla_decode, " in done.stderr
