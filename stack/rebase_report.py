"""What a rebase did to each patch: a table, and a range-diff for the CHANGELOG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stack.git import git
from stack.rebasing import Carried, State
from stack.resolutions import Resolutions, fingerprint
from stack.trial import diff_of

MEANING = {
    "unchanged": "the same diff, on other line numbers at most",
    "context changed": "the same added and removed lines, in other surroundings",
    "merged": "git's three-way merge changed the added or removed lines, without a conflict",
    "amended": "changed by hand, or by a recorded amendment, where git saw no conflict",
    "resolved by hand": "in conflict, settled by a person in this rebase",
    "resolution replayed": "in conflict, settled by a recorded resolution",
    "already upstream": "the merge leaves nothing of it",
    "dropped": "left out on purpose",
}


def status(work: Path, state: State, each: Carried, learned: Resolutions) -> str:
    """One of ``MEANING``'s words for a patch."""
    if each.new is None:
        return "dropped" if each.dropped else "already upstream"
    if each.patch in learned.conflicts:
        replayed = each.patch in state.replayed and each.patch not in state.by_hand
        return "resolution replayed" if replayed else "resolved by hand"
    if each.patch in learned.amendments:
        return "amended"
    if fingerprint(work, each.old) == fingerprint(work, each.new):
        return "unchanged"
    same = _changed_lines(work, each.old) == _changed_lines(work, each.new)
    return "context changed" if same else "merged"


def _changed_lines(work: Path, commit: str) -> list[tuple[bytes, bytes]]:
    """The added and removed lines of a commit, each with its file."""
    found = []
    path = b""
    for line in diff_of(work, commit).split(b"\n"):
        if line.startswith(b"diff --git "):
            path = line
        elif line.startswith((b"+", b"-")) and not line.startswith((b"+++ ", b"--- ")):
            found.append((path, line))
    return found


def table(
    work: Path, state: State, carried: Sequence[Carried], learned: Resolutions
) -> dict[str, str]:
    """The status of each patch, in order."""
    return {each.patch: status(work, state, each, learned) for each in carried}


def counts(statuses: dict[str, str]) -> str:
    """The table in one line."""
    counted = Counter(statuses.values())
    return ", ".join(f"{counted[word]} {word}" for word in MEANING if counted[word])


def range_diff(work: Path, each: Carried) -> str:
    """How a patch differs from what it was, as ``git range-diff`` shows it, or nothing."""
    if each.new is None:
        return ""
    shown = git(
        *("range-diff", "--no-color", "--creation-factor=1000", "--no-dual-color"),
        *(f"{each.old}^..{each.old}", f"{each.new}^..{each.new}"),
        cwd=work,
    ).lines
    return "\n".join(shown[1:])


def markdown(work: Path, state: State, carried: Sequence[Carried], learned: Resolutions) -> str:
    """The whole report."""
    statuses = table(work, state, carried, learned)
    lines = [
        f"# The series, from vLLM {state.origin} to {state.onto}",
        "",
        f"{len(statuses)} patches: {counts(statuses)}.",
        "",
        "| patch | what became of it |",
        "|---|---|",
        *(f"| `{patch}` | {word} |" for patch, word in statuses.items()),
        "",
        *(
            f"* **{word}**: {meaning}."
            for word, meaning in MEANING.items()
            if word in statuses.values()
        ),
        "",
        "## Range-diff",
        "",
        "Each patch beside what it was; a patch that is not shown has the same diff. The first",
        "column is the change of the patch itself.",
    ]
    for each in carried:
        text = range_diff(work, each)
        if text.strip():
            lines += ["", f"### {each.patch}", "", "~~~~diff", _trimmed(text), "~~~~"]
    return "\n".join(lines) + "\n"


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.split("\n"))
