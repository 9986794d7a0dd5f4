"""What a gate file names, against what its workload gives: names, rows, values and profiles.

Each raises a `StackError` that says the file, the key, what came and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from stack.errors import StackError

if TYPE_CHECKING:
    from gates.spec import Expected, Gate, Threshold


def names(gate: Gate, keys: frozenset[str], figures: frozenset[str], file: str) -> None:
    """Refuse a column, threshold or expected value of something the workload does not give."""

    def refuse(where: str, name: str, allowed: frozenset[str]) -> None:
        if name not in allowed:
            raise StackError(
                f"{file}: {where}: {gate.workload!r} has no {name!r}; allowed: "
                + ", ".join(sorted(allowed))
            )

    for number, column in enumerate(gate.columns):
        refuse(f"columns.{number}.figure", column.figure, keys | figures)
    for number, threshold in enumerate(gate.thresholds):
        refuse(f"thresholds.{number}.figure", threshold.figure, figures)
    for number, expected in enumerate(gate.expected):
        for figure in expected.figures:
            refuse(f"expected.{number}.figures", figure, figures)
    for place, one in _of_rows(gate):
        for key in one.where:
            refuse(f"{place}.where", key, keys)


def rows(keys: Iterable[dict[str, Any]], file: str, size: str) -> None:
    """Refuse two rows of one key: the second would pass for the first, and never be measured."""
    seen: list[dict[str, Any]] = []
    for key in keys:
        if key in seen:
            raise StackError(
                f"{file}: {size}: two rows are alike ({_said(key)}); each must be another"
            )
        seen.append(key)


def where(gate: Gate, keys: list[dict[str, Any]], file: str) -> None:
    """Refuse a ``where`` that no row of either size fits: what it bounds would never be judged."""
    for place, one in _of_rows(gate):
        for name, value in one.where.items():
            allowed = list(dict.fromkeys(repr(key[name]) for key in keys if name in key))
            if not any(key.get(name) == value for key in keys):
                raise StackError(
                    f"{file}: {place}.where.{name}: no row has {value!r}; allowed: "
                    + (", ".join(allowed) or f"none, the rows have no {name}")
                )
        if not any(one.where.items() <= key.items() for key in keys):
            raise StackError(
                f"{file}: {place}.where: no row has {_said(one.where)} at once; allowed: what one "
                "row of params or short has"
            )


def profiles(gate: Gate, allowed: Sequence[str], file: str) -> None:
    """Refuse the name of a profile that there is not: what it is said of would never be met."""
    for place, one in _of_rows(gate):
        if one.profile is not None and one.profile not in allowed:
            raise StackError(
                f"{file}: {place}.profile: must be one of {', '.join(allowed)}, not {one.profile!r}"
            )


def _of_rows(gate: Gate) -> Iterator[tuple[str, Threshold | Expected]]:
    """What is said of some rows, on some hardware, with its place in the file."""
    for kind in ("thresholds", "expected"):
        for number, one in enumerate(getattr(gate, kind)):
            yield f"{kind}.{number}", one


def _said(key: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in key.items())
