"""Change values in ``upstream.toml`` and leave every other byte of it as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from stack.errors import StackError
from stack.shared import write


def replaced(text: str, values: Mapping[str, str], name: str = "upstream.toml") -> str:
    """The text with some strings replaced.

    Args:
        text: TOML with a table header and a ``key = "value"`` on a line of its own for each value.
        values: New strings by dotted key, such as ``{"tree.patched": "<40 hex digits>"}``.
        name: The file's name for errors.

    Raises:
        StackError: A key has no such line, or a value has a quote, a backslash or a line end.
    """
    lines = text.splitlines(keepends=True)
    for dotted, value in values.items():
        if re.search(r'["\\\n]', value):
            raise StackError(f"{name}: {dotted} cannot be set to {value!r}")
        table, _, key = dotted.rpartition(".")
        line = re.compile(rf'({re.escape(key)}\s*=\s*)"[^"]*"(.*)', re.DOTALL)
        current = ""
        for number, old in enumerate(lines):
            if match := re.match(r"\[(.+)\]", old):
                current = match[1]
            elif current == table and (match := line.fullmatch(old)):
                lines[number] = f'{match[1]}"{value}"{match[2]}'
                break
        else:
            raise StackError(f'{name}: no line {key} = "..." in [{table}]', f"add it to {name}")
    return "".join(lines)


def set_values(path: Path, values: Mapping[str, str]) -> None:
    """Replace strings in the file, in one step; nothing is written where nothing changes."""
    text = path.read_text(encoding="utf-8")
    new = replaced(text, values, path.name)
    if new != text:
        write(path, new)
