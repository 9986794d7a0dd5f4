"""The contest of a benchmark: who is timed, who is left out and why, and what a row says."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks
from benchmarks import harness
from benchmarks.contest import contest, relative_error

EXPECTED = torch.tensor([3.0, 4.0])
# Microseconds a call that the clock of these tests shows.
CLOCK = {"native": 8.0, "right": 10.0, "slow": 40.0}


@pytest.fixture
def report(monkeypatch, tmp_path):
    """A report, and nothing that needs a GPU."""

    class Driver:
        def get_current_device(self):
            return 0

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(harness, "roofs", lambda: harness.Roofs(1000.0, 100.0))
    monkeypatch.setattr(harness, "_machine", lambda gpu: gpu or "a machine")
    monkeypatch.setattr(
        harness,
        "compare",
        lambda calls, **_: {name: harness.Timing(CLOCK[name], 1.0, 99.0) for name in calls},
    )
    return harness.Report(argparse.Namespace(out=tmp_path / "rows.jsonl", commit="abc"))


def rows(report) -> list[dict]:
    return [json.loads(line) for line in report._out.read_text().splitlines()]


def run(report, candidates, native=None, **options):
    contest(
        report,
        {"op": "an operation", "tokens": 3},
        native=native or {},
        ours=lambda _: ("right", candidates),
        error=lambda call: relative_error(call(), EXPECTED),
        tolerance=0.01,
        work={"flops": 2e8},
        lowerings=["sm120"],
        **options,
    )


def right():
    return EXPECTED


def test_a_row_says_what_was_measured(report):
    run(report, {"right": [right], "slow": [right]}, native={"native": [right]})
    native, chosen, slow = rows(report)
    assert (native["candidate"], native["lowering"]) == ("native", "")
    assert (chosen["candidate"], chosen["lowering"]) == ("right", "sm120")
    assert [row["in_table"] for row in (native, chosen, slow)] == [False, True, False]
    assert [row["to_native"] for row in (native, chosen, slow)] == [1.0, 0.8, 0.2]
    # 2e8 operations in 10 us are 20 TFLOP/s, a fifth of the roof.
    assert (chosen["us"], chosen["tflops"], chosen["share_of_roof"]) == (10.0, 20.0, 0.2)
    assert (chosen["op"], chosen["tokens"], chosen["commit"]) == ("an operation", 3, "abc")


def test_a_unit_of_several_calls(report):
    run(report, {"right": [right]}, native={"native": [right]}, unit=2)
    chosen = rows(report)[1]
    assert (chosen["us"], chosen["tflops"], chosen["to_native"]) == (20.0, 10.0, 0.8)


def nan():
    return torch.full_like(EXPECTED, torch.nan)


def off():
    return EXPECTED * 1.02


def broken():
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (nan, "WRONG: relative error nan, allowed: 0.01"),
        (off, "WRONG: relative error 0.0"),
        (broken, "RuntimeError: out of resource: shared memory"),
    ],
)
def test_what_is_wrong_is_named_and_not_timed(report, capsys, call, reason):
    run(report, {"wrong": [call], "right": [right]})
    assert [row["candidate"] for row in rows(report)] == ["right"]
    assert f"wrong: {reason}" in capsys.readouterr().out


def test_nothing_right_leaves_no_row(report, capsys):
    run(report, {"wrong": [nan]})
    assert "WRONG" in capsys.readouterr().out
    assert not report._out.exists()


def test_what_fails_beside_others_is_tried_alone(report):
    tries = []

    def second_time():
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("another thread was compiling")
        return EXPECTED

    run(report, {"right": [second_time]})
    assert [row["candidate"] for row in rows(report)] == ["right"]


def test_a_native_kernel_with_weights_of_its_own_has_no_error(report):
    contest(
        report,
        {"op": "an operation"},
        native={"native": [nan]},
        ours=lambda _: ("right", {"right": [right]}),
        error=lambda call: None if call is nan else relative_error(call(), EXPECTED),
        tolerance=0.01,
        work={},
        lowerings=["native"],
    )
    assert [row["error"] for row in rows(report)] == [None, 0.0]


def test_both_lowerings_unless_one_is_named(report):
    seen = []

    def ours(lowering):
        seen.append((lowering, os.environ["SM12X_LOWERING"]))
        return "right", {"right": [right]}

    contest(
        report,
        {},
        native={},
        ours=ours,
        error=lambda call: 0.0,
        tolerance=1.0,
        work={},
        lowerings=None,
    )
    assert seen == [("native", "native"), ("sm120", "sm120")]
    assert [row["lowering"] for row in rows(report)] == ["native", "sm120"]


def test_the_relative_error_by_hand():
    # Errors 0.3 and 0.4 of 3 and 4: both roots of the mean square are in the ratio 1 to 10.
    assert relative_error(EXPECTED * 1.1, EXPECTED) == pytest.approx(0.1)
    assert relative_error(EXPECTED.double(), EXPECTED) == 0


def test_columns_line_up_whatever_the_labels(report, capsys):
    run(report, {"right": [right], "slow": [right]})
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[:4] == ["op", "tokens", "lowering", "candidate"]
