"""What a gate file names, against what its workload gives: names, rows, values and profiles.

Each raises a `StackError` that says the file, the key, what came and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from stack.errors import StackError

if TYPE_CHECKING:
    from gates.spec import Gate


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
        for key in threshold.where:
            refuse(f"thresholds.{number}.where", key, keys)
    for number, expected in enumerate(gate.expected):
        for figure in expected.figures:
            refuse(f"expected.{number}.figures", figure, figures)
        for key in expected.where:
            refuse(f"expected.{number}.where", key, keys)


def rows(keys: Iterable[dict[str, Any]], file: str, size: str) -> None:
    """Refuse two rows of one key: the second would pass for the first, and never be measured."""
    seen: list[dict[str, Any]] = []
    for key in keys:
        if key in seen:
            said = ", ".join(f"{name} = {value!r}" for name, value in key.items())
            raise StackError(f"{file}: {size}: two rows are alike ({said}); each must be another")
        seen.append(key)


def where(gate: Gate, keys: list[dict[str, Any]], file: str) -> None:
    """Refuse a ``where`` that no row of either size fits: what it bounds would never be judged."""
    for kind in ("thresholds", "expected"):
        for number, one in enumerate(getattr(gate, kind)):
            for name, value in one.where.items():
                allowed = list(dict.fromkeys(repr(key[name]) for key in keys if name in key))
                if not any(key.get(name) == value for key in keys):
                    raise StackError(
                        f"{file}: {kind}.{number}.where.{name}: no row has {value!r}; allowed: "
                        + (", ".join(allowed) or f"none, the rows have no {name}")
                    )
            if not any(one.where.items() <= key.items() for key in keys):
                said = ", ".join(f"{name} = {value!r}" for name, value in one.where.items())
                raise StackError(
                    f"{file}: {kind}.{number}.where: no row has {said} at once; allowed: what one "
                    "row of params or short has"
                )


def profiles(gate: Gate, allowed: Sequence[str], file: str) -> None:
    """Refuse the name of a profile that there is not: what it is said of would never be met."""
    for kind in ("thresholds", "expected"):
        for number, one in enumerate(getattr(gate, kind)):
            if one.profile is not None and one.profile not in allowed:
                raise StackError(
                    f"{file}: {kind}.{number}.profile: must be one of {', '.join(allowed)}, "
                    f"not {one.profile!r}"
                )
