"""The list of files that upstream's repository and the sdist of the pinned release share.

``stack/shared-files/VERSION.txt`` holds a line a file, ``MODE BLOB PATH``, sorted by path, and a
line ``excluded PATH: REASON`` for each file of the sdist that is not on the list. Whatever the
source, the release's commit holds the files on the list and no other, so that both sources give one
tree and one commit id.

The list is made from the sdist. That the repository has the same files is an expectation until
``python -m stack sources --compare`` has run where both are at hand. A file that is a symbolic link
upstream, for one, comes as a copy of its target in an sdist: the comparison names it, and it then
has to be left out by a rule in ``stack.sdist``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from stack.errors import StackError
from stack.sdist import Contents, File

HEADER = """\
# Files that upstream's repository and the sdist of vLLM {version} share: mode, git blob id, path.
# Made by `python -m stack sources --write` from the sdist; never edit it by hand.
"""
_LINE = re.compile(r"(100644|100755) ([0-9a-f]{40}) (.+)")
_EXCLUDED = re.compile(r"excluded (.+?): (.+)")


@dataclass(frozen=True)
class SharedFiles:
    """What the list says. ``excluded`` maps a file of the sdist that is left out to the reason."""

    files: dict[str, File]
    excluded: dict[str, str]


def render(contents: Contents, version: str) -> str:
    """The text of the list for an sdist's contents."""
    lines = [f"excluded {path}: {reason}\n" for path, reason in sorted(contents.excluded.items())]
    lines += [f"{file.mode} {file.blob} {path}\n" for path, file in sorted(contents.files.items())]
    return HEADER.format(version=version) + "".join(lines)


def load(path: Path) -> SharedFiles:
    """Read the list.

    Raises:
        StackError: It is missing, or a line is malformed, out of order or comes twice; the message
            names the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        raise StackError(
            f"{path} does not exist: the shared files of this release are not listed",
            "run `python -m stack sources --write`",
        ) from None
    files: dict[str, File] = {}
    excluded: dict[str, str] = {}
    last = ""
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        if line.startswith("#"):
            continue
        if match := _EXCLUDED.fullmatch(line):
            excluded[match[1]] = match[2]
        elif (match := _LINE.fullmatch(line)) and match[3] > last:
            last = match[3]
            files[last] = File(match[1], match[2])
        else:
            raise StackError(
                f"{path.name}: line {number} is malformed, out of order or comes twice: {line!r}",
                "run `python -m stack sources --write`",
            )
    if not files:
        raise StackError(f"{path.name} lists no file", "run `python -m stack sources --write`")
    return SharedFiles(files, excluded)


def write(path: Path, text: str) -> None:
    """Replace a text file in one step: a reader sees the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
