"""The work tree that ``import`` makes and ``export`` reads, and what it remembers of both.

``.git/stack.json`` records the release's commit, the head that ``patches/`` holds, and the patches
beyond an ``import --upto``. The tag ``base`` marks the release's commit for whoever edits.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from stack.errors import StackError
from stack.git import git
from stack.shared import write

BRANCH = "series"
BASE_TAG = "base"
_IN_PROGRESS = {
    "rebase-apply/applying": "git am",
    "rebase-apply": "git rebase",
    "rebase-merge": "git rebase",
    "MERGE_HEAD": "git merge",
    "CHERRY_PICK_HEAD": "git cherry-pick",
    "REVERT_HEAD": "git revert",
}


@dataclass(frozen=True)
class State:
    """What a work tree remembers.

    Args:
        release: The release's version.
        base: Id of the release's commit.
        exported: Id of the head whose patches are in ``patches/``.
        held_back: Patches of the series that follow ``exported`` and were not imported.
    """

    release: str
    base: str
    exported: str
    held_back: tuple[str, ...] = ()


def _git_folder(path: Path) -> Path:
    return Path(git("rev-parse", "--absolute-git-dir", cwd=path).text)


def is_work_tree(path: Path) -> bool:
    """Whether ``import`` made this folder."""
    return (path / ".git" / "stack.json").is_file()


def read_state(path: Path) -> State:
    """Read what the work tree remembers.

    Raises:
        StackError: The folder was not made by ``import``, or its record is broken.
    """
    if not is_work_tree(path):
        raise StackError(
            f"{path} was not made by `python -m stack import`", "run `python -m stack import` first"
        )
    file = path / ".git" / "stack.json"
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        return State(
            release=str(table["release"]),
            base=str(table["base"]),
            exported=str(table["exported"]),
            held_back=tuple(str(name) for name in table["held_back"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise StackError(f"{file} is broken: {error!r}", "import into another folder") from None


def write_state(path: Path, state: State) -> None:
    """Record the state, and let the tag ``base`` name the release's commit."""
    git("tag", "-f", BASE_TAG, state.base, cwd=path)
    write(path / ".git" / "stack.json", json.dumps(asdict(state), indent=2) + "\n")


def in_progress(path: Path) -> str | None:
    """The git command that stopped half-way in this work tree, or ``None``."""
    folder = _git_folder(path)
    return next((name for mark, name in _IN_PROGRESS.items() if (folder / mark).exists()), None)


def edits(path: Path) -> list[str]:
    """The files that are changed or new and not committed, each with git's two status letters."""
    # Refreshing the index first keeps a file that was only touched off the list.
    git("update-index", "-q", "--refresh", cwd=path, check=False)
    return git("status", "--porcelain", "-z", "--untracked-files=all", cwd=path).fields


def head(path: Path) -> str:
    """The commit id of the work tree's head."""
    return git("rev-parse", "--verify", "HEAD^{commit}", cwd=path).text


def unexported(path: Path, state: State) -> list[str]:
    """The commits that ``patches/`` does not hold, as ``ID SUBJECT``, newest first."""
    tips = [head(path)]
    branch = git("rev-parse", "-q", "--verify", f"refs/heads/{BRANCH}", cwd=path, check=False)
    if branch.returncode == 0:
        tips.append(branch.text)
    tips = [tip for tip in tips if tip not in (state.exported, state.base)]
    if not tips:
        return []
    known = [
        f"^{commit}"
        for commit in (state.base, state.exported)
        if git("cat-file", "-e", commit, cwd=path, check=False).returncode == 0
    ]
    return git("log", "--format=%h %s", *tips, *known, cwd=path).lines
