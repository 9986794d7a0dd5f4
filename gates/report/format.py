"""How figures are written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from gates.spec import Unit

NONE = "-"


def shown(value: Any, unit: Unit) -> str:
    """A figure in its unit; ``-`` where there is none. Times come in seconds, shares as 0 to 1."""
    if value is None or (unit == "text" and value == ""):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if unit == "text" or isinstance(value, str):
        return str(value)
    if isinstance(value, list | tuple):
        return " / ".join(shown(one, unit) for one in value)
    return {
        "int": lambda: f"{round(value):,}",
        "s": lambda: f"{value:.3f} s",
        "ms": lambda: f"{value * 1000:.2f} ms",
        "tok/s": lambda: f"{value:.2f}",
        "ratio": lambda: f"{value:.3f}",
        "percent": lambda: f"{value * 100:.2f}%",
        "number": lambda: f"{value:.4g}",
        "yes/no": lambda: "yes" if value else "no",
    }[unit]()


def spread(values: dict[str, float] | None, unit: Unit) -> str:
    """The median of repeats, and the smallest and largest: ``12.160 s (12.141 s to 12.190 s)``."""
    if not values:
        return NONE
    middle = shown(values["median"], unit)
    if values["n"] < 2:
        return middle
    return f"{middle} ({shown(values['min'], unit)} to {shown(values['max'], unit)})"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[bool]) -> str:
    """A Markdown table; a bar or the beginning of a tag is escaped, a line break is a space."""
    lines = [heads, ["---:" if side else "---" for side in right]]
    lines += [
        [re.sub(r"[|<]", r"\\\g<0>", cell).replace("\n", " ") for cell in row] for row in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
