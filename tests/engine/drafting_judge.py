"""Whether answers with drafting are those without, as far as the engine's own noise allows.

Another batch alone moves log-probabilities, because kernels then sum in another order. How far it
moves them on the same build is measured: in the answers of ``mtp0`` to the same requests together,
in reverse order and alone. Two answers may part where both tokens were as likely as that noise;
nothing else passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from answers import Answer, difference

BASE = "mtp0"

# Batches of `mtp0`: the same requests, in other company.
_SAME = (("mixed", "reversed"), ("mixed", "alone"), ("growing", "growing alone"))


@dataclass(frozen=True)
class Noise:
    """Largest difference of a log-probability, and largest fork, that another batch causes."""

    gap: float
    fork: float

    @property
    def allowed_fork(self) -> float:
        """Two tokens change places where each moves by as much as the noise, one up, one down."""
        return max(self.fork, 2 * self.gap)

    @property
    def allowed_gap(self) -> float:
        return 2 * self.gap


@dataclass(frozen=True)
class Seen:
    """How the answers of two ways to the same requests differ."""

    answers: int
    identical: int
    forks: int
    largest_fork: float
    largest_gap: float


@dataclass(frozen=True)
class Check:
    """Something that must hold, whether it does, and what was seen."""

    run: str
    what: str
    holds: bool
    seen: str


def compare(first: Iterable[dict], second: Iterable[dict]) -> Seen:
    """
    Raises:
        ValueError: They are not as many, or an answer is shorter than the other.
    """
    pairs = list(zip(map(_answer, first), map(_answer, second), strict=True))
    for one, other in pairs:
        if len(one.tokens) != len(other.tokens):
            raise ValueError(f"answers of {len(one.tokens)} and {len(other.tokens)} tokens")
    there = [difference(one, other) for one, other in pairs]
    back = [difference(other, one) for one, other in pairs]
    forks = [
        max(a.fork, b.fork)
        for a, b in zip(there, back, strict=True)
        if a.fork is not None and b.fork is not None
    ]
    return Seen(
        answers=len(pairs),
        identical=len(pairs) - len(forks),
        forks=len(forks),
        largest_fork=max(forks, default=0.0),
        largest_gap=max((one.gap for one in there), default=0.0),
    )


def noise(base: Mapping[str, Any]) -> Noise:
    """Of the answers of ``mtp0``."""
    answers = base["answers"]
    seen = [compare(answers[one], answers[other]) for one, other in _SAME]
    return Noise(max(one.largest_gap for one in seen), max(one.largest_fork for one in seen))


def judge(runs: Mapping[str, Mapping[str, Any]]) -> tuple[Noise, list[dict[str, Any]], list[Check]]:
    """
    Args:
        runs: Name -> what :func:`drafting_runs.run` gave; ``mtp0`` among them.

    Returns:
        The noise, a row for each comparison, and all checks.
    """
    allowed = noise(runs[BASE])
    base = runs[BASE]["answers"]
    base = {**base, "again": base["mixed"]}
    rows: list[dict[str, Any]] = []
    checks: list[Check] = []

    def add(run: str, what: str, holds: bool, seen: str) -> None:
        checks.append(Check(run, what, holds, seen))

    for name, result in runs.items():
        add(name, "nothing compiled after the start", *_nothing(result["compiled"]))
        if name == BASE:
            for one, other in _SAME:
                seen = compare(base[one], base[other])
                rows.append({"run": name, "batch": other, **_row(seen)})
            continue
        for batch, answers in result["answers"].items():
            seen = compare(base[batch], answers)
            rows.append({"run": name, "batch": batch, **_row(seen)})
            holds = seen.largest_fork <= allowed.allowed_fork
            holds &= seen.largest_gap <= allowed.allowed_gap
            add(
                name,
                f"the answers of mtp0 ({batch})",
                holds,
                f"{seen.identical} of {seen.answers} identical, forks within "
                f"{seen.largest_fork:.3f}, log-probabilities within {seen.largest_gap:.3f}",
            )
        if not name.startswith("mtp0"):
            accepted, drafted = result["accepted"], result["drafted"]
            # Where none is, no accepted token was tested; where all are, no rejected one.
            add(name, "some drafts accepted", 0 < accepted < drafted, f"{accepted} of {drafted}")
        if "-drafts" in name:
            count = result["replayed"]
            add(name, "drafting passes were replayed", count > 0, f"{count} of them")
        if "-preempted" in name:
            count = result["preemptions"]
            add(name, "requests were preempted", count > 0, f"{count} times")
        if "again" in result["answers"]:
            hits = [answer["cached"] or 0 for answer in result["answers"]["again"]]
            add(name, "a repeated prompt hits the cache", max(hits) > 0, f"cached tokens: {hits}")
    for name, result in runs.items():
        full = name.replace("-piecewise", "").replace("-drafts", "")
        # With these the batches or the sums of two runs differ, and so may the tokens.
        exact = not {"async", "unordered"} & set(name.split("-"))
        if name != full and full in runs and exact:
            for batch, answers in result["answers"].items():
                seen = compare(runs[full]["answers"][batch], answers)
                add(
                    name,
                    f"exactly the tokens of {full} ({batch})",
                    seen.forks == 0,
                    f"{seen.identical} of {seen.answers} identical",
                )
    return allowed, rows, checks


def _answer(stored: Mapping[str, Any]) -> Answer:
    steps = [{int(token): value for token, value in step} for step in stored["steps"]]
    return Answer(list(stored["tokens"]), steps)


def _nothing(compiled: Mapping[str, int]) -> tuple[bool, str]:
    names = [f"{name} ({count})" for name, count in sorted(compiled.items())]
    return not compiled, ", ".join(names) or "none"


def _row(seen: Seen) -> dict[str, Any]:
    return {
        key: round(value, 5) if isinstance(value, float) and math.isfinite(value) else value
        for key, value in asdict(seen).items()
    }
