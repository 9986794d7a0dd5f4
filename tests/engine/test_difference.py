"""How two answers are held against each other: hand-made cases."""

import math

import pytest

from answers import Answer, difference
from run_engine import LOGPROB_TOLERANCE, Checks, check_same, compare


def answer(*steps: dict[int, float]) -> Answer:
    """The first entry of each step is the token that was chosen."""
    return Answer([next(iter(step)) for step in steps], list(steps))


def test_equal_answers_have_a_gap_and_no_fork():
    first = answer({7: -0.5, 3: -2.0}, {9: -1.0})
    second = answer({7: -0.4, 3: -2.0}, {9: -1.25})
    found = difference(first, second)
    assert found.gap == pytest.approx(0.25)
    assert found.fork is None


def test_what_follows_a_fork_does_not_count():
    first = answer({7: -0.5}, {9: -1.0, 4: -1.1}, {5: -0.1})
    second = answer({7: -0.5}, {4: -1.0, 9: -1.1}, {5: -9.0})
    found = difference(first, second)
    assert found.gap == 0.0
    assert found.fork == pytest.approx(0.1)


def test_a_fork_to_a_token_out_of_sight_is_infinite():
    assert difference(answer({1: -0.1, 2: -3.0}), answer({8: -0.1})).fork == math.inf


@pytest.mark.parametrize(
    ("second", "holds"),
    [
        ({1: -0.5 - LOGPROB_TOLERANCE / 2}, True),
        ({1: -0.5 - LOGPROB_TOLERANCE * 2}, False),
        ({2: -0.5}, True),
        ({3: -0.5}, False),
    ],
)
def test_check_same_holds_within_the_tolerance_alone(second, holds, capsys):
    first = answer({1: -0.5, 2: -0.5 - LOGPROB_TOLERANCE / 2, 3: -0.5 - LOGPROB_TOLERANCE * 2})
    checks = Checks()
    check_same("it", [(first, answer(second))], checks)
    assert checks.rows[0]["holds"] is holds
    assert capsys.readouterr().out.startswith("ok" if holds else "FAIL")


def test_compare_counts_positions_gaps_and_agreement():
    mine = {"teacher_forced": {"logprob": [-1.0, -2.0, -3.0, -4.0], "top": [1, 2, 3, 4]}}
    other = {"teacher_forced": {"logprob": [-1.0, -2.5, -3.0, -4.1], "top": [1, 2, 3, 5]}}
    assert compare(mine, other) == {
        "positions": 4,
        "mean_logprob_gap": 0.15,
        "largest_logprob_gap": 0.5,
        "top_1_agreement": 0.75,
    }
