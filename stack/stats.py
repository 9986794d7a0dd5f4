"""``stats``: how large the series is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stack.header import Patch


@dataclass(frozen=True)
class Row:
    """The size of one patch, or of all: counts of hunks, lines and files of upstream."""

    patch: str
    kind: str
    hunks: int
    added: int
    removed: int
    files: int


def rows(series: Sequence[Patch]) -> list[Row]:
    """A row a patch, in order."""
    return [
        Row(
            patch=patch.name,
            kind=", ".join(patch.trailers.get("Kind", [])),
            hunks=sum(change.hunks for change in patch.changes),
            added=sum(len(change.added) for change in patch.changes),
            removed=sum(change.removed for change in patch.changes),
            files=len(patch.changes),
        )
        for patch in series
    ]


def total(series: Sequence[Patch]) -> Row:
    """The sum. A file that several patches touch counts once."""
    each = rows(series)
    return Row(
        patch=f"{len(each)} patches",
        kind="",
        hunks=sum(row.hunks for row in each),
        added=sum(row.added for row in each),
        removed=sum(row.removed for row in each),
        files=len({path for patch in series for path in patch.paths}),
    )


def touched(series: Sequence[Patch]) -> dict[str, list[str]]:
    """The files of upstream that are touched, sorted, each with its patches."""
    found: dict[str, list[str]] = {}
    for patch in series:
        for path in patch.paths:
            found.setdefault(path, []).append(patch.name)
    return dict(sorted(found.items()))


def as_json(series: Sequence[Patch]) -> dict[str, Any]:
    """The table as plain data: ``patches``, ``total`` and ``files``."""
    summed = asdict(total(series)) | {"patches": len(series)}
    del summed["patch"], summed["kind"]
    return {
        "patches": [asdict(row) for row in rows(series)],
        "total": summed,
        "files": touched(series),
    }


def table(series: Sequence[Patch]) -> list[str]:
    """The table as lines: a heading, a row a patch, and the total."""
    each = [*rows(series), total(series)]
    width = max(len(row.patch) for row in each)
    lines = [f"{'patch':<{width}}  {'kind':<6}  {'hunks':>5}  {'+':>5}  {'-':>5}  {'files':>5}"]
    lines += [
        f"{row.patch:<{width}}  {row.kind:<6}  {row.hunks:>5}  {row.added:>5}  {row.removed:>5}  "
        f"{row.files:>5}"
        for row in each
    ]
    lines.insert(-1, "-" * len(lines[0]))
    return lines
