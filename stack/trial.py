"""Try one commit on another base, with git's own three-way merge, and say how it went.

``forward`` tries a whole series this way, ``rebase`` learns from it which patches were in conflict.
"""

from __future__ import annotations

import enum
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stack.errors import StackError
from stack.git import git

# The exit status of a command that a conflict stopped: 1 is an error, 2 is wrong usage.
EXIT_CONFLICT = 3

_MARKER = re.compile(rb"(<{7}|\|{7}|={7}|>{7})( |\r?$)")
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class Outcome(enum.Enum):
    """How a patch fares on a release.

    * ``APPLIES``: as it stands. Lines may have moved; context and removed lines are all there, and
      the three-way merge gives the same files.
    * ``THREE_WAY``: git's three-way merge takes it without a conflict, its context changed. Worth
      a look.
    * ``CONFLICT``: the release changed what the patch changes.
    * ``UPSTREAM``: the release has the change: the three-way merge changes no file, or the patch
      as it stands can be taken back from the release.
    """

    APPLIES = "applies"
    THREE_WAY = "applies with three-way"
    CONFLICT = "conflict"
    UPSTREAM = "already upstream"


@dataclass(frozen=True)
class Conflict:
    """A file that the merge could not settle.

    Attributes:
        path: The file, by its name in the release (by the patch's where the release lacks it).
        reason: ``changed by both``, ``deleted upstream``, ``deleted by the patch``,
            ``added by both`` or ``renamed apart``.
        hunks: First and last line in the release's file of each region in conflict, from 1. A
            region that is empty there is ``(n, n - 1)``: between lines n - 1 and n.
    """

    path: str
    reason: str
    hunks: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        if not self.hunks:
            return f"{self.path} ({self.reason})"
        places = ", ".join(str(a) if a >= b else f"{a}-{b}" for a, b in self.hunks)
        noun = "hunk" if len(self.hunks) == 1 else "hunks"
        return f"{self.path} ({len(self.hunks)} {noun}: {places})"


@dataclass(frozen=True)
class Trial:
    """What became of one commit.

    Attributes:
        outcome: How it went.
        tree: The tree with the change; the tree before it where it conflicts.
        conflicts: The files in conflict, none for the other outcomes.
        note: What a reader should know besides, or nothing.
    """

    outcome: Outcome
    tree: str
    conflicts: tuple[Conflict, ...] = ()
    note: str = ""


def unmerged(work: Path) -> dict[str, dict[int, tuple[str, str]]]:
    """The files in conflict in a work tree's index: path -> stage -> (mode, blob id).

    Stage 1 is the file as both knew it, 2 as the release has it, 3 as the patch wants it.
    """
    found: dict[str, dict[int, tuple[str, str]]] = {}
    for entry in git("ls-files", "-u", "-z", cwd=work).fields:
        meta, _, path = entry.partition("\t")
        mode, blob, stage = meta.split(" ")
        found.setdefault(path, {})[int(stage)] = (mode, blob)
    return found


def conflicts(work: Path) -> tuple[Conflict, ...]:
    """Describe the files in conflict in a work tree."""
    reasons = {
        (1, 2, 3): "changed by both",
        (2, 3): "added by both",
        (1, 3): "deleted upstream",
        (1, 2): "deleted by the patch",
    }
    described = []
    for path, stages in sorted(unmerged(work).items()):
        reason = reasons.get(tuple(sorted(stages)), "renamed apart")
        hunks: tuple[tuple[int, int], ...] = ()
        file = work / path
        if 2 in stages and 3 in stages and file.is_file() and not file.is_symlink():
            hunks = _regions(work, file.read_bytes(), stages[2][1])
        described.append(Conflict(path, reason, hunks))
    return tuple(described)


def _regions(work: Path, merged: bytes, ours: str) -> tuple[tuple[int, int], ...]:
    """The regions in conflict of a merged file, as lines of the release's file (blob ``ours``).

    What the merge settled shifts the lines: the merged file with the release's side of each region
    is compared with the release's file to undo that.
    """
    kept: list[bytes] = []
    found: list[tuple[int, int]] = []
    side = ""
    start = 0
    for line in merged.split(b"\n"):
        match = _MARKER.match(line)
        mark = match[1][:1] if match else b""
        if mark == b"<" and not side:
            side, start = "ours", len(kept) + 1
        elif mark == b"|" and side == "ours":
            side = "base"
        elif mark == b"=" and side in ("ours", "base"):
            side = "theirs"
        elif mark == b">" and side == "theirs":
            found.append((start, max(len(kept), start - 1)))
            side = ""
        elif side in ("", "ours"):
            kept.append(line)
    if not found:
        return ()
    blob = git("hash-object", "-w", "--stdin", cwd=work, input=b"\n".join(kept)).text
    # (after, by): from line `after` on, a line of `kept` lies `by` lines further on in `ours`.
    shifts = []
    for line in git("diff", "-U0", ours, blob, cwd=work).lines:
        if match := _HUNK.match(line):
            old, new = int(match[2] or 1), int(match[4] or 1)
            shifts.append((int(match[3]) + (new or 1), old - new))
    return tuple((_back(first, shifts), _back(last, shifts)) for first, last in found)


def _back(line: int, shifts: Sequence[tuple[int, int]]) -> int:
    return line + sum(by for after, by in shifts if line >= after)


def diff_of(work: Path, commit: str) -> bytes:
    """The diff of a commit against its parent, fit for ``git apply``."""
    return git(
        *("diff", "--full-index", "--binary", "--no-renames", f"{commit}^", commit), cwd=work
    ).stdout


def apply_to(work: Path, tree: str, diff: bytes, *options: str) -> str | None:
    """The tree that a diff makes of a tree, without fuzz, or ``None`` where it does not fit."""
    if not diff:
        return tree
    with tempfile.TemporaryDirectory(prefix="sm12x-index-") as folder:
        env = {"GIT_INDEX_FILE": f"{folder}/index"}
        git("read-tree", tree, cwd=work, env=env)
        done = git("apply", "--cached", *options, cwd=work, input=diff, env=env, check=False)
        return None if done.returncode else git("write-tree", cwd=work, env=env).text


def attempt(work: Path, commit: str) -> Trial:
    """Try ``commit`` on the HEAD of a clean work tree.

    HEAD stays where it is. The index and the files are left as the merge leaves them: reset or
    commit them before the next call.
    """
    before = git("rev-parse", "HEAD^{tree}", cwd=work).text
    done = git("cherry-pick", "--no-commit", commit, cwd=work, check=False)
    diff = diff_of(work, commit)
    found = conflicts(work)
    if done.returncode and not found:
        raise StackError(f"git cherry-pick failed: {done.last_error}", f"in {work}")
    if found:
        if apply_to(work, before, diff, "-R") is not None:
            note = "found by taking the patch back from the release"
            return Trial(Outcome.UPSTREAM, before, note=note)
        note = _presence(work, diff, before)
        return Trial(Outcome.CONFLICT, before, found, note)
    after = git("write-tree", cwd=work).text
    if after == before:
        return Trial(Outcome.UPSTREAM, before)
    if apply_to(work, before, diff) == after:
        return Trial(Outcome.APPLIES, after)
    wanted, got = _size(work, f"{commit}^", commit), _size(work, before, after)
    note = "part of it is in the release already" if got < wanted else ""
    return Trial(Outcome.THREE_WAY, after, note=note)


def _size(work: Path, old: str, new: str) -> int:
    """Added and removed lines between two trees."""
    total = 0
    for line in git("diff", "--numstat", "--no-renames", old, new, cwd=work).lines:
        added, removed, _ = line.split("\t", 2)
        total += int(added) + int(removed) if added != "-" else 1
    return total


def _presence(work: Path, diff: bytes, tree: str) -> str:
    """A hint where every line that a patch adds is in the release's files, in whatever order."""
    text = diff.decode("utf-8", "replace")
    added: dict[str, set[str]] = {}
    path = ""
    for line in text.splitlines():
        if line.startswith("+++ b/"):
            path = line[6:]
        elif line.startswith("+") and line[1:].strip():
            added.setdefault(path, set()).add(line[1:].strip())
    if not added:
        return ""
    for path, lines in added.items():
        shown = git("cat-file", "blob", f"{tree}:{path}", cwd=work, check=False)
        present = {line.strip() for line in shown.stdout.decode("utf-8", "replace").splitlines()}
        if shown.returncode or not lines <= present:
            return ""
    return "every line that it adds is in the release: perhaps upstream has it"
