"""What counts as the same answer: hand-made answers of hand-made runs."""

import math

import pytest

from drafting_judge import Noise, compare, judge, noise


def answer(*steps: dict[int, float], cached: int = 0) -> dict:
    """The first entry of each step is the token that was chosen; stored as JSON has it."""
    return {
        "tokens": [next(iter(step)) for step in steps],
        "steps": [[[token, value] for token, value in step.items()] for step in steps],
        "cached": cached,
    }


def result(answers: dict, **facts) -> dict:
    facts = {"compiled": {}, "accepted": 3, "drafted": 9, "preemptions": 0} | facts
    return {"answers": answers, **facts}


PLAIN = answer({5: -0.5, 6: -0.7}, {7: -1.0, 5: -1.3})


def moved(by: float) -> dict:
    return answer({5: -0.5 + by, 6: -0.7}, {7: -1.0 - by, 5: -1.3})


def base() -> dict:
    """Another batch moves a log-probability by 0.1, and one answer parts at 0.2."""
    parted = answer({6: -0.6, 5: -0.7}, {8: -2.0})
    return result(
        {
            "mixed": [PLAIN, PLAIN],
            "reversed": [moved(0.1), PLAIN],
            "alone": [PLAIN, parted],
            "growing": [PLAIN],
            "growing alone": [PLAIN],
        },
        drafted=0,
        accepted=0,
    )


def failing(runs: dict) -> list[str]:
    _, _, checks = judge(runs)
    return [f"{check.run}: {check.what}" for check in checks if not check.holds]


def test_the_noise_by_hand():
    found = noise(base())
    # 6 against 5: 0.2 in the first answer's eyes, 0.1 in the second's.
    assert found.fork == pytest.approx(0.2)
    assert found.gap == pytest.approx(0.1)
    assert found.allowed_fork == pytest.approx(0.2)
    assert found.allowed_gap == pytest.approx(0.2)


def test_two_moves_of_the_noise_may_part_an_answer():
    assert Noise(gap=0.3, fork=0.1).allowed_fork == pytest.approx(0.6)


def test_a_fork_counts_in_both_eyes():
    there = compare(
        [answer({5: -0.5, 6: -0.6})],
        [answer({6: -0.1, 5: -3.0})],
    )
    assert there.forks == 1
    assert there.largest_fork == pytest.approx(2.9)


def test_the_same_answers_hold():
    runs = {"mtp0": base(), "mtp2": result({"mixed": [PLAIN, moved(0.15)]})}
    assert failing(runs) == []


@pytest.mark.parametrize(
    "second",
    [
        moved(0.3),
        answer({6: -0.1, 5: -0.5}, {9: -1.0}),  # parts at 0.4 in its own eyes
        answer({9: -0.1}, {9: -1.0}),  # to a token that mtp0 did not consider
    ],
)
def test_more_than_the_noise_does_not_hold(second):
    runs = {"mtp0": base(), "mtp2": result({"mixed": [PLAIN, second]})}
    assert failing(runs) == ["mtp2: the answers of mtp0 (mixed)"]


def test_a_fork_within_the_noise_holds_but_is_not_identical():
    parted = answer({6: -0.6, 5: -0.75}, {9: -1.0})
    runs = {"mtp0": base(), "mtp2": result({"mixed": [PLAIN, PLAIN]})}
    runs["mtp2-piecewise"] = result({"mixed": [PLAIN, parted]})
    assert failing(runs) == ["mtp2-piecewise: exactly the tokens of mtp2 (mixed)"]


@pytest.mark.parametrize("flag", ["async", "unordered"])
def test_runs_whose_batches_or_sums_differ_need_not_have_the_same_tokens(flag):
    parted = answer({6: -0.6, 5: -0.75}, {9: -1.0})
    runs = {"mtp0": base(), f"mtp2-{flag}": result({"mixed": [PLAIN, PLAIN]})}
    runs[f"mtp2-piecewise-{flag}"] = result({"mixed": [PLAIN, parted]})
    assert failing(runs) == []


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        ({"accepted": 0}, "some drafts accepted"),
        ({"accepted": 9}, "some drafts accepted"),
        ({"compiled": {"mix_kernel": 2}}, "nothing compiled after the start"),
    ],
)
def test_a_run_that_shows_nothing_does_not_hold(facts, what):
    runs = {"mtp0": base(), "mtp1": result({"mixed": [PLAIN, PLAIN]}, **facts)}
    assert failing(runs) == [f"mtp1: {what}"]


def test_preemption_and_hits_must_have_happened():
    answers = {"mixed": [PLAIN, PLAIN], "again": [PLAIN, answer(*({5: -0.5}, {7: -1.0}))]}
    runs = {"mtp0": base(), "mtp2-cache": result(answers)}
    runs["mtp2-preempted"] = result({"growing": [PLAIN]})
    assert failing(runs) == [
        "mtp2-cache: a repeated prompt hits the cache",
        "mtp2-preempted: requests were preempted",
    ]
    answers["again"][1]["cached"] = 256
    runs["mtp2-preempted"]["preemptions"] = 1
    assert failing(runs) == []


def test_passes_in_graphs_must_have_been_replayed_and_give_the_same_tokens():
    parted = answer({6: -0.6, 5: -0.75}, {9: -1.0})
    runs = {"mtp0": base(), "mtp2-cache": result({"mixed": [PLAIN, PLAIN]})}
    runs["mtp2-drafts-cache"] = result({"mixed": [PLAIN, parted]}, replayed=0)
    assert failing(runs) == [
        "mtp2-drafts-cache: drafting passes were replayed",
        "mtp2-drafts-cache: exactly the tokens of mtp2-cache (mixed)",
    ]
    runs["mtp2-drafts-cache"] = result({"mixed": [PLAIN, PLAIN]}, replayed=7)
    assert failing(runs) == []


def test_growing_answers_have_their_own_base_and_noise():
    runs = {"mtp0": base(), "mtp2": result({"growing": [moved(0.3)]})}
    assert failing(runs) == ["mtp2: the answers of mtp0 (growing)"]
    runs["mtp0"]["answers"]["growing alone"] = [moved(-0.2)]
    assert failing(runs) == []


def test_a_lost_answer_is_an_error():
    short = answer({5: -0.5})
    with pytest.raises(ValueError, match="answers of 2 and 1 tokens"):
        compare([PLAIN], [short])
    with pytest.raises(ValueError):
        compare([PLAIN, PLAIN], [PLAIN])


def test_a_fork_out_of_sight_is_infinite():
    seen = compare([answer({5: -0.5})], [answer({9: -0.5})])
    assert seen.largest_fork == math.inf
