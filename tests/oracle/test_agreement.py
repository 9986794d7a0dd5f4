"""Divergences, verdicts and shares, against cases worked out by hand."""

import math

import numpy as np
import pytest

from tests.oracle.agreement import (
    Agreement,
    compare,
    fault_share,
    judge,
    judge_share,
    parts_of,
    table,
)
from tests.oracle.scores import Scores
from tests.oracle.sequences import Sequence


def run(rows, tokens=None, vocab=4, sequences=None, checkpoint="a") -> Scores:
    """A run from probabilities, one row a position of one sequence."""
    logprobs = np.log(np.array(rows, dtype=np.float64)).astype(np.float32)
    if tokens is None:
        tokens = np.broadcast_to(np.arange(logprobs.shape[1]), logprobs.shape)
    if sequences is None:
        sequences = [Sequence(tuple(range(2, 2 + len(rows))), 1)]
    return Scores(checkpoint, sequences, np.array(tokens, np.int32), logprobs, vocab, {})


def test_the_divergence_by_hand():
    first = run([[0.5, 0.25, 0.125, 0.125], [0.7, 0.1, 0.1, 0.1]])
    second = run([[0.25, 0.5, 0.125, 0.125], [0.7, 0.1, 0.1, 0.1]])
    found = compare(first, second)
    # 0.5 ln 2 - 0.25 ln 2
    assert found.kl == pytest.approx([0.25 * math.log(2), 0], abs=1e-6)
    assert found.same_top.tolist() == [False, True]
    figures = found.over(np.array([True, True]))
    assert figures.positions == 2
    assert figures.mean_kl == pytest.approx(0.125 * math.log(2), abs=1e-6)
    assert figures.largest_kl == pytest.approx(0.25 * math.log(2), abs=1e-6)
    assert (figures.same_top, figures.covered) == (0.5, pytest.approx(1))


def test_the_order_of_the_tokens_does_not_matter():
    first = run([[0.5, 0.25, 0.125, 0.125]])
    shuffled = run([[0.125, 0.125, 0.5, 0.25]], tokens=[[3, 2, 0, 1]])
    assert compare(first, shuffled).kl == pytest.approx([0], abs=1e-6)
    assert compare(first, shuffled).same_top.all()


def test_tokens_that_one_run_lacks_count_as_one():
    # Both keep 0; the rest is 0.5 and 0.25.
    first = run([[0.5, 0.3]], tokens=[[0, 1]], vocab=100)
    second = run([[0.75, 0.2]], tokens=[[0, 2]], vocab=100)
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    found = compare(first, second)
    assert found.kl == pytest.approx([expected], abs=1e-6)
    assert found.covered == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"checkpoint": "b"}, "checkpoint"),
        ({"vocab": 5}, "vocab_size"),
        ({"sequences": [Sequence((9,), 1)]}, "sequences"),
    ],
)
def test_runs_over_different_things_are_not_compared(other, name):
    rows = [[0.4, 0.3, 0.2, 0.1]]
    with pytest.raises(ValueError, match=f"{name}: the two runs are over different ones"):
        compare(run(rows), run(rows, **other))


def test_parts_split_the_positions():
    sequences = [Sequence(tuple([2] * 3), 1), Sequence(tuple([2] * 600), 513)]
    parts = parts_of(run([[0.5, 0.5]] * 603, vocab=2, sequences=sequences))
    counts = {name: int(mask.sum()) for name, mask in parts.items()}
    assert counts == {
        **{"all": 603, "prefill": 514, "fed": 89},
        **{"up to 128 tokens": 131, "up to 512": 384, "up to 2048": 88},
    }
    # Of the second sequence, 513 to 599 were fed; of the first, 1 and 2.
    assert np.flatnonzero(parts["fed"]).tolist() == [1, 2, *range(3 + 513, 3 + 600)]


def figures(mean, median, largest, same, positions=1000) -> dict[str, Agreement]:
    return {"all": Agreement(positions, mean, median, largest, same, 1.0)}


NOISE = figures(0.01, 0.004, 0.2, 0.95)


@pytest.mark.parametrize(
    ("seen", "problem"),
    [
        (NOISE, None),
        (figures(0.019, 0.0079, 0.79, 0.9), None),
        (figures(0.021, 0.004, 0.2, 0.95), "all: mean_kl 0.021, allowed: 0.02"),
        (figures(0.01, 0.009, 0.2, 0.95), "all: median_kl 0.009, allowed: 0.008"),
        (figures(0.01, 0.004, 0.81, 0.95), "all: largest_kl 0.81, allowed: 0.8"),
        # Twice 0.05, and three times sqrt(0.1 / 1000).
        (figures(0.01, 0.004, 0.2, 0.869), "all: other_top 0.131, allowed: 0.13"),
        (figures(0.01, 0.004, 0.2, 0.871), None),
    ],
)
def test_what_is_further_than_the_noise_is_named(seen, problem):
    assert judge(seen, NOISE) == ([problem] if problem else [])


def test_noise_over_other_positions_does_not_judge():
    with pytest.raises(ValueError, match="all: other positions"):
        judge(figures(0, 0, 0, 1, positions=999), NOISE)


@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_the_share_of_a_fault_is_found_below_the_noise(truth):
    random = np.random.default_rng(7)
    places, vocab = 4000, 16

    def normalised(logits):
        return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    base = random.normal(0, 2, (places, vocab))
    fault = random.normal(0, 0.05, base.shape)
    sequences = [Sequence(tuple([2] * places), 1)]
    exact, faulty, seen = (
        run(normalised(logits), vocab=vocab, sequences=sequences)
        for logits in (base, base + fault, base + truth * fault + random.normal(0, 0.4, base.shape))
    )
    far = table(exact, compare(exact, seen))["all"].mean_kl
    assert far > 20 * table(exact, compare(exact, faulty))["all"].mean_kl
    share, error = fault_share(exact, faulty, seen)
    assert abs(share - truth) < 4 * error < 0.4
    assert judge_share(share, error) == ("present" if truth else "absent")


@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_what_rounding_has_in_common_with_a_fault_is_no_share_of_it(truth):
    """Both make likely tokens less likely: by half as much here as the fault does."""
    random = np.random.default_rng(8)
    base = random.normal(0, 2, (4000, 16))
    fault = -0.2 * base
    noises = [random.normal(0, 0.2, base.shape) - 0.1 * base for _ in range(2)]
    sequences = [Sequence(tuple([2] * len(base)), 1)]
    exact, faulty, rounded, seen = (
        run(np.exp(one) / np.exp(one).sum(1, keepdims=True), vocab=16, sequences=sequences)
        for one in (base, base + fault, base + noises[0], base + truth * fault + noises[1])
    )
    assert abs(fault_share(exact, faulty, seen)[0] - truth) > 0.4
    # In units of the fault's change, rounding has 0.5 and a run with both 1.5: of the half that
    # rounding has not, that is (1.5 - 0.5) / (1 - 0.5).
    share, error = fault_share(exact, faulty, seen, rounded)
    assert abs(share - 2 * truth) < 4 * error + 0.02
    assert judge_share(share, error) == ("present" if truth else "absent")


def test_a_fault_that_changes_nothing_has_no_share():
    one = run([[0.5, 0.25, 0.125, 0.125]])
    with pytest.raises(ValueError, match="changes nothing"):
        fault_share(one, one, one)


def test_a_fault_that_rounding_covers_has_no_share():
    exact, faulty = run([[0.5, 0.25, 0.125, 0.125]]), run([[0.25, 0.5, 0.125, 0.125]])
    with pytest.raises(ValueError, match="rounding alone changes as much"):
        fault_share(exact, faulty, exact, faulty)


def test_a_share_near_one_half_is_undecided():
    assert judge_share(0.6, 0.05) == "undecided"
    assert judge_share(0.4, 0.05) == "undecided"
    assert judge_share(0.7, 0.05) == "present"
    assert judge_share(0.3, 0.05) == "absent"
