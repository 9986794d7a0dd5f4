"""The report of ``forward``: Markdown for people, JSON for machines."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stack.forwarding import Forwarded, Line
from stack.pin import Pin
from stack.trial import Outcome

FORMAT = 1
MEANING = {
    Outcome.APPLIES: "as it stands; its lines may have moved",
    Outcome.THREE_WAY: "git's three-way merge takes it, its context changed: worth a look",
    Outcome.CONFLICT: "the release changed what it changes; it is left out, and the next patches "
    "are tried without it",
    Outcome.UPSTREAM: "the merge changes nothing, or the patch can be taken back from the release",
}


@dataclass(frozen=True)
class Report:
    """What was tried: the day, the pin and the series it was made from, and the results."""

    made: datetime.date
    pin: Pin
    series: str
    results: Sequence[Forwarded]


def describe(line: Line) -> str:
    """One patch's line, after its name."""
    text = line.trial.outcome.value
    if line.trial.conflicts:
        text += ": " + ", ".join(str(conflict) for conflict in line.trial.conflicts)
    if line.trial.note:
        text += f"; {line.trial.note}"
    if line.missing:
        text += f"; it depends on {', '.join(line.missing)}, which is left out"
    return text


def summary(result: Forwarded) -> str:
    """One release in one line."""
    counts = ", ".join(
        f"{result.count(each)} {each.value}" for each in Outcome if result.count(each)
    )
    return f"{result.version}: {counts or 'no patch'}"


def markdown(report: Report) -> str:
    """The report as Markdown; the text of the weekly issue."""
    versions = [result.version for result in report.results]
    pin = report.pin
    lines = [
        "# The series on later releases of vLLM",
        "",
        f"Made on {report.made.isoformat()} by `python -m stack forward {' '.join(versions)}`."
        if versions
        else f"Made on {report.made.isoformat()}: no release is later than the pinned one.",
        "",
        "| what | version | digest |",
        "|---|---|---|",
        f"| pinned release | {pin.version} | commit `{pin.commit}` |",
        f"| its sdist | `{pin.sdist.filename}` | sha256 `{pin.sdist.sha256}` |",
        f"| series | `patches/series` and its patches | sha256 `{report.series}` |",
    ]
    lines += [
        f"| tried | `{each.sdist.filename}` | sha256 `{each.sdist.sha256}` |"
        for each in report.results
    ]
    if report.results:
        lines += [
            "",
            f"| patch | {' | '.join(versions)} |",
            "|---" * (len(versions) + 1) + "|",
        ]
        for row in zip(*(result.lines for result in report.results), strict=True):
            cells = " | ".join(line.trial.outcome.value for line in row)
            lines.append(f"| `{row[0].patch}` | {cells} |")
        lines.append("")
        lines += [f"* **{outcome.value}**: {meaning}." for outcome, meaning in MEANING.items()]
        lines += [
            "",
            "This says what git makes of the patches. Whether the result is right, only `check`",
            "and the tests on it can say.",
        ]
    for result in report.results:
        lines += ["", f"## {summary(result)}", ""]
        lines += [
            f"* `{line.patch}`: {describe(line)}"
            for line in result.lines
            if line.trial.outcome is not Outcome.APPLIES or line.missing
        ] or ["Every patch applies."]
    return "\n".join(lines) + "\n"


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON's types."""
    pin = report.pin
    return {
        "format": FORMAT,
        "made": report.made.isoformat(),
        "pin": {"version": pin.version, "commit": pin.commit, "sdist": asdict(pin.sdist)},
        "series": {"sha256": report.series},
        "releases": [
            {
                "version": result.version,
                "sdist": asdict(result.sdist),
                "patches": [
                    {
                        "patch": line.patch,
                        "outcome": line.trial.outcome.value,
                        "conflicts": [
                            {
                                "path": c.path,
                                "reason": c.reason,
                                "hunks": [list(h) for h in c.hunks],
                            }
                            for c in line.trial.conflicts
                        ],
                        "note": line.trial.note,
                        "missing": list(line.missing),
                    }
                    for line in result.lines
                ],
            }
            for result in report.results
        ],
    }
