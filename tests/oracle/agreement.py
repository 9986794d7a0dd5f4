"""How far two runs over the same checkpoint and sequences are apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from tests.oracle.scores import Scores

# The noise of a right engine is another draw than the oracle's. Its mean over thousands of
# positions moves little, so that twice is ample; the largest of thousands has a long tail.
# It states what formats explain. A fault below that is found by `fault_share`.
MEAN_FACTOR = 2.0
LARGEST_FACTOR = 4.0
# Positions at which an engine may disagree on the likeliest token beyond twice the noise's share:
# three standard deviations of a count near that share, which `judge` computes.
COUNT_DEVIATIONS = 3.0


@dataclass(frozen=True)
class Agreement:
    """Figures over a set of positions.

    Attributes:
        positions: How many.
        mean_kl: Mean of the Kullback-Leibler divergence of the second run from the first, in nats.
        median_kl: Its median: without the positions where rounding chose another expert.
        largest_kl: Its largest value.
        same_top: Share of the positions with the same likeliest token.
        covered: Mean probability, in the first run, of the tokens that both kept. Where it is below
            1, the others count as one, and the divergence is a lower bound.
    """

    positions: int
    mean_kl: float
    median_kl: float
    largest_kl: float
    same_top: float
    covered: float


@dataclass(frozen=True)
class Compared:
    """Figures by position: the divergence, whether the likeliest token is the same, the cover."""

    kl: np.ndarray
    same_top: np.ndarray
    covered: np.ndarray

    def over(self, chosen: np.ndarray) -> Agreement:
        """The figures over the chosen positions.

        Args:
            chosen: bool ``[P]``, with one ``True`` at least.
        """
        kl = self.kl[chosen]
        return Agreement(
            positions=int(chosen.sum()),
            mean_kl=float(kl.mean()),
            median_kl=float(np.median(kl)),
            largest_kl=float(kl.max()),
            same_top=float(self.same_top[chosen].mean()),
            covered=float(self.covered[chosen].mean()),
        )


def compare(first: Scores, second: Scores) -> Compared:
    """Hold ``second`` against ``first``.

    Raises:
        ValueError: The runs are over other checkpoints, vocabularies or sequences.
    """
    _require_same(first, second)
    places = len(first.tokens)
    kl, covered = np.empty(places), np.empty(places)
    for place in range(places):
        log_p, log_q = _at_common(place, first, second)
        p, q = np.exp(log_p), np.exp(log_q)
        covered[place] = p.sum()
        kl[place] = (p * (log_p - log_q)).sum()
        if len(p) < first.vocab_size:
            kl[place] += _rest(1 - p.sum(), 1 - q.sum())
    top = [run.tokens[np.arange(places), run.logprobs.argmax(1)] for run in (first, second)]
    return Compared(kl, top[0] == top[1], covered)


def _require_same(first: Scores, second: Scores) -> None:
    for name in ("checkpoint", "vocab_size", "sequences"):
        if getattr(first, name) != getattr(second, name):
            raise ValueError(f"{name}: the two runs are over different ones; score the same")


def fault_share(
    exact: Scores, faulty: Scores, seen: Scores, rounded: Scores | None = None
) -> tuple[float, float]:
    """How much of a known fault is in a run: 0 where it is absent, 1 where the run has it.

    The least-squares share of the fault's change of log-probabilities in the run's, weighted by the
    exact probabilities. Rounding averages out over the positions, so that a fault far below the
    noise of the formats shows; but for what any change has in common, that it makes what was likely
    less so. Rounding alone has that share of a fault: it counts as 0 where ``rounded`` is given.
    A run with the fault whose roundings go the same way then has a share above 1.

    Args:
        rounded: The oracle's run with the engine's roundings.

    Returns:
        The share and its standard error.

    Raises:
        ValueError: The runs are over different checkpoints, vocabularies or sequences, or the fault
            changes nothing, or nothing that rounding does not.
    """
    _require_same(exact, faulty)
    _require_same(exact, seen)
    rounded = exact if rounded is None else rounded
    _require_same(exact, rounded)
    places = len(exact.tokens)
    common, square, alone = np.empty(places), np.empty(places), np.empty(places)
    for place in range(places):
        base, with_fault, with_run, with_noise = _at_common(place, exact, faulty, seen, rounded)
        weight = np.exp(base)
        changes = []
        for one in (with_fault - base, with_run - base, with_noise - base):
            # A constant is no change: probabilities are normalised.
            changes.append(one - (weight * one).sum() / max(weight.sum(), 1e-30))
        square[place] = (weight * changes[0] ** 2).sum()
        common[place] = (weight * changes[0] * changes[1]).sum()
        alone[place] = (weight * changes[0] * changes[2]).sum()
    if square.sum() == 0:
        raise ValueError("faulty: the fault changes nothing at these positions")
    common, square = common - alone, square - alone
    if square.sum() <= 0:
        raise ValueError("faulty: rounding alone changes as much in its direction; nothing to tell")
    share = common.sum() / square.sum()
    error = np.sqrt(((common - share * square) ** 2).sum()) / square.sum()
    return float(share), float(error)


def _at_common(place: int, *runs: Scores) -> list[np.ndarray]:
    """Log-probabilities of the tokens that all runs kept at a position, in one order, float64."""
    kept = runs[0].tokens[place]
    for run in runs[1:]:
        kept = np.intersect1d(kept, run.tokens[place], assume_unique=True)
    found = []
    for run in runs:
        order = np.argsort(run.tokens[place])
        at = order[np.searchsorted(run.tokens[place], kept, sorter=order)]
        found.append(run.logprobs[place, at].astype(np.float64))
    return found


def judge_share(share: float, error: float) -> str:
    """``absent``, ``present``, or ``undecided`` where three standard errors reach one half."""
    if abs(share - 0.5) < COUNT_DEVIATIONS * error:
        return "undecided"
    return "present" if share > 0.5 else "absent"


def _rest(p: float, q: float) -> float:
    """What the tokens that are not in both runs add, as one; float32 sums leave it 1e-6 unsure."""
    return 0.0 if p < 1e-6 else p * float(np.log(p / max(q, 1e-6)))


def parts_of(scores: Scores) -> dict[str, np.ndarray]:
    """Positions by what computed them, each a bool ``[P]`` mask; empty parts are left out.

    ``prefill`` and ``fed`` (one token a step) split all positions, and so do the four ranges of
    length: within the window of 128, up to 512 tokens, up to the 2,048 that C4A's 512 entries
    cover, and beyond.
    """
    index = np.concatenate([np.arange(len(s.tokens)) for s in scores.sequences])
    prompt = np.concatenate([np.full(len(s.tokens), s.prompt) for s in scores.sequences])
    ranges = [(0, 128), (128, 512), (512, 2048), (2048, 1 << 40)]
    names = ["up to 128 tokens", "up to 512", "up to 2048", "beyond 2048"]
    masks = {
        "all": np.ones(len(index), bool),
        "prefill": index < prompt,
        "fed": index >= prompt,
        **{
            name: (index >= low) & (index < high)
            for name, (low, high) in zip(names, ranges, strict=True)
        },
    }
    return {name: mask for name, mask in masks.items() if mask.any()}


def table(scores: Scores, compared: Compared) -> dict[str, Agreement]:
    """The figures of every part of :func:`parts_of`."""
    return {name: compared.over(mask) for name, mask in parts_of(scores).items()}


def judge(seen: dict[str, Agreement], noise: dict[str, Agreement]) -> list[str]:
    """What is further apart than the noise of the formats explains; empty where nothing is.

    In every part, the mean and the median divergence may be twice the noise's, the largest four
    times, and the share of positions with another likeliest token twice, plus three standard
    deviations of such a count.

    Args:
        seen: Figures of an engine against the exact oracle.
        noise: Figures of the oracle with the engine's roundings against the exact oracle, over the
            same positions.
    """
    checks: list[tuple[str, Callable[[Agreement], float], Callable[[Agreement], float]]] = [
        ("mean_kl", lambda a: a.mean_kl, lambda n: MEAN_FACTOR * n.mean_kl),
        ("median_kl", lambda a: a.median_kl, lambda n: MEAN_FACTOR * n.median_kl),
        ("largest_kl", lambda a: a.largest_kl, lambda n: LARGEST_FACTOR * n.largest_kl),
        ("other_top", lambda a: 1 - a.same_top, _most_other),
    ]
    problems = []
    for part, figures in seen.items():
        if figures.positions != noise[part].positions:
            raise ValueError(f"{part}: other positions than the noise's; score the same")
        for name, value, limit in checks:
            if value(figures) > limit(noise[part]):
                problems.append(
                    f"{part}: {name} {value(figures):.3g}, allowed: {limit(noise[part]):.3g}"
                )
    return problems


def _most_other(noise: Agreement) -> float:
    share = max(MEAN_FACTOR * (1 - noise.same_top), 1 / noise.positions)
    return share + COUNT_DEVIATIONS * float(np.sqrt(share / noise.positions))


def as_json(figures: dict[str, Agreement]) -> dict[str, dict[str, float]]:
    """For a report."""
    return {name: asdict(one) for name, one in figures.items()}
