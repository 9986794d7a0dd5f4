"""The closing table and line, which people and CI read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """How one part ended. ``problem`` says why where counts alone do not (nothing ran, a crash)."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether the part passed; one that ran nothing has not."""
        return not self.failed and not self.problem and self.passed > 0


def judged(result: Result, exit_status: int) -> Result:
    """A part's result in the light of its process's exit status: no silent pass.

    A non-zero exit, or a part in which nothing passed, counts as a failure of its own, so that the
    closing line never says ``0 failed`` of a run that did.
    """
    problem = result.problem
    if not problem and exit_status and not result.failed:
        problem = f"ended with exit status {exit_status}"
    if not problem and not result.failed and not result.passed:
        problem = "no test passed"
    failed = result.failed + (1 if problem and not result.failed else 0)
    return Result(result.name, result.passed, failed, result.skipped, result.seconds, problem)


def clock(seconds: float) -> str:
    """``75`` as ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def table(results: Iterable[Result]) -> str:
    """One row a part: counts, time as minutes and seconds, and the problem if there is one."""
    rows = [("part", "passed", "failed", "skipped", "time", "")]
    rows += [
        (r.name, str(r.passed), str(r.failed), str(r.skipped), clock(r.seconds), r.problem)
        for r in results
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [row[column].rjust(widths[column]) for column in range(1, 5)]
        lines.append("  ".join([*cells, row[5]]).rstrip())
    return "\n".join(lines)


def closing_line(results: Sequence[Result]) -> str:
    """The counts of all parts, in the words that CI readers look for."""
    passed, failed, skipped = (
        sum(getattr(result, name) for result in results) for name in ("passed", "failed", "skipped")
    )
    return f"{passed} passed, {failed} failed, {skipped} skipped"
