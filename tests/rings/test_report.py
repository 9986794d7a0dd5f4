"""The table and the closing line: no part that failed, crashed or ran nothing may look passed."""

from __future__ import annotations

import re

import pytest

from tests.rings.report import Result, clock, closing_line, judged, table

# As the CI that reads the last line takes it.
CLOSING = re.compile(r"\d+ passed, \d+ failed, \d+ skipped")


@pytest.mark.parametrize(
    ("counts", "status", "ok", "failed"),
    [
        ((3, 0, 1), 0, True, 0),
        ((3, 2, 0), 1, False, 2),
        ((3, 0, 0), 1, False, 1),  # pytest says failure and no outcome shows it
        ((3, 0, 0), -11, False, 1),  # a crash after three tests
        ((0, 0, 0), 0, False, 1),  # nothing ran
        ((0, 0, 0), 4, False, 1),  # a missing folder
        ((0, 0, 9), 0, False, 1),  # all skipped
        ((3, 2, 0), 0, False, 2),
    ],
)
def test_a_part_passes_only_when_something_did_and_nothing_failed(counts, status, ok, failed):
    result = judged(Result("x", *counts), status)
    assert (result.ok, result.failed) == (ok, failed)
    assert bool(result.problem) is (not ok and counts[1] == 0)


def test_the_closing_line_adds_up():
    line = closing_line([Result("a", 3, 0, 1), Result("b", 4, 2, 0)])
    assert line == "7 passed, 2 failed, 1 skipped"
    assert CLOSING.fullmatch(line) and CLOSING.fullmatch(closing_line([]))


def test_the_table_has_a_row_a_part_with_its_problem():
    text = table([Result("kernels", 30, 0, 2, 75.4), Result("wheel", 0, 1, 0, 3, "no test passed")])
    head, first, second = text.splitlines()
    assert head.split() == ["part", "passed", "failed", "skipped", "time"]
    assert first.split() == ["kernels", "30", "0", "2", "1:15"]
    assert second.endswith("0:03  no test passed")


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3601, "60:01")])
def test_times_are_minutes_and_seconds(seconds, shown):
    assert clock(seconds) == shown
