"""The laws that one patch can be held to by itself: its header, its files, its lines.

Each function returns one line for each violation, without the patch's name.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from stack.header import KINDS, NONE, TRAILERS, Patch, slug
from stack.shared import SharedFiles

# Added lines of code that a patch may have before it is code of its own rather than a seam. Blank
# lines, comments, and files under tests/ or without .py are not counted. The largest seam of the
# first series, which forwards six operations, has under 40.
MOST_CODE_LINES = 60
_UNFINISHED = ("fixup!", "squash!", "amend!")


def header(patch: Patch) -> list[str]:
    """Subject, reason and trailers are complete, and the file is named after the subject."""
    lines = []
    if not patch.subject:
        return ["has no subject"]
    if patch.subject.startswith(_UNFINISHED):
        lines.append(f"subject begins with {patch.subject.split('!')[0]}!: squash it first")
    stem = Path(patch.name).stem
    if stem != slug(patch.subject):
        lines.append(f"its subject asks for the file name {slug(patch.subject)}.patch")
    if not patch.reason:
        lines.append("has no paragraph of why between the subject and the trailers")
    elif "\n\n" in patch.reason:
        lines.append("has more than one paragraph between the subject and the trailers")
    for trailer in TRAILERS:
        values = patch.trailers.get(trailer, [])
        if not values:
            lines.append(f"trailer {trailer} is missing")
        elif not all(values):
            lines.append(f"trailer {trailer} is empty")
        elif len(values) > 1 and trailer not in ("Depends", "Tests"):
            lines.append(f"trailer {trailer} stands {len(values)} times")
    kind = patch.trailers.get("Kind", [""])[0]
    if kind and kind not in KINDS:
        lines.append(f"trailer Kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if patch.trailers.get("Upstream", [""])[0].lower().rstrip(".;:,") == NONE:
        lines.append("trailer Upstream is none without the reason")
    return lines


def shared_only(patch: Patch, listed: SharedFiles) -> list[str]:
    """The patch touches no file that only one of the two sources has."""
    return [
        f"touches {path}, which the submodule and the sdist are not known to share: "
        f"{listed.excluded[path]}"
        for path in patch.paths
        if path in listed.excluded
    ]


def white_space(patch: Patch) -> list[str]:
    """No added line ends in blanks. The carriage return of a CRLF file is not a blank."""
    return [
        f"adds trailing white space to {change.path}: {line.decode('utf-8', 'replace')!r}"
        for change in patch.changes
        for line in change.added
        if re.search(rb"[ \t]\r?$", line)
    ]


def code_lines(patch: Patch) -> int:
    """Added lines of Python outside ``tests/`` that are neither blank nor a comment."""
    return sum(
        1
        for change in patch.changes
        if change.path.endswith(".py") and not change.path.startswith("tests/")
        for line in change.added
        if line.strip() and not line.strip().startswith(b"#")
    )


def seam(patch: Patch) -> list[str]:
    """The patch calls our code rather than being it."""
    count = code_lines(patch)
    if count <= MOST_CODE_LINES:
        return []
    return [
        f"adds {count} lines of code, a seam has {MOST_CODE_LINES} at most: move it to kernels/"
    ]


def dependencies(patch: Patch, before: list[str], series: list[str]) -> list[str]:
    """``Depends`` names patches that stand earlier; a core patch names no extra one."""
    lines = []
    for name in patch.values("Depends"):
        if name == NONE:
            lines.append("trailer Depends names patches beside none")
        elif name not in series:
            lines.append(f"trailer Depends names {name}, which is not in the series")
        elif name not in before:
            lines.append(f"trailer Depends names {name}, which does not stand earlier")
        elif patch.name.startswith("core/") and name.startswith("extra/"):
            lines.append(f"a core patch depends on {name}")
    return lines


def defines_test(text: str, names: list[str]) -> bool:
    """Whether a test file defines ``[Class, function]`` or ``[function]``."""
    try:
        body: list[ast.stmt] = ast.parse(text).body
    except SyntaxError:
        return False
    for name in names:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = [node for node in body if isinstance(node, kinds) and node.name == name]
        if not found:
            return False
        body = found[0].body
    return True
