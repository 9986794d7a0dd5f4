"""The order file ``patches/series``: one patch a line, below ``core/`` or ``extra/``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from stack.errors import StackError
from stack.header import Patch, load

FOLDERS = ("core", "extra")
_NAME = re.compile(r"(?:core|extra)/[A-Za-z0-9_][A-Za-z0-9._-]*\.patch")


@dataclass(frozen=True)
class Order:
    """The order file: its lines as they are, the patches it names, and what is wrong with it."""

    lines: tuple[str, ...]
    names: tuple[str, ...]
    problems: tuple[str, ...]


def series_file(patches: Path) -> Path:
    """The path of the order file."""
    return patches / "series"


def read_order(patches: Path) -> Order:
    """Read the order file, and gather every malformed or repeated line.

    Raises:
        StackError: The file is missing, or is not UTF-8.
    """
    try:
        text = series_file(patches).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StackError(
            f"{series_file(patches)} does not exist", "it lists the patches, one path a line"
        ) from None
    except UnicodeDecodeError as error:
        raise StackError(f"{series_file(patches)} is not UTF-8: {error}") from None
    names: list[str] = []
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        if name != line or not _NAME.fullmatch(name):
            problems.append(
                f"patches/series: line {number} is {line!r}, expected core/NAME.patch or "
                "extra/NAME.patch, alone on its line"
            )
        elif name in names:
            problems.append(f"patches/series: line {number} names {name} a second time")
        else:
            names.append(name)
    return Order(tuple(text.splitlines()), tuple(names), tuple(problems))


def load_series(patches: Path) -> list[Patch]:
    """Read every patch, in order.

    Raises:
        StackError: The order file has a problem, or a patch that it names cannot be read.
    """
    order = read_order(patches)
    if order.problems:
        raise StackError(order.problems[0], "mend patches/series")
    return [load(patches, name) for name in order.names]


def files_in(patches: Path) -> list[str]:
    """The names of all files below ``core/`` and ``extra/``, whatever the order file says."""
    return sorted(
        path.relative_to(patches).as_posix()
        for folder in FOLDERS
        for path in (patches / folder).rglob("*")
        if not path.is_dir() and path.name != ".gitkeep"
    )
