"""Carry the series to another release, with ``git rebase`` in a work repository of its own.

The repository holds both releases as commits and the series on the old one. ``start`` makes it and
lets git rebase the series; recorded resolutions (``stack.resolutions``) are used on the way. At a
conflict that nothing recorded settles it stops, and ``proceed`` goes on from wherever git stands:
at a conflict that was resolved, after a kill, or after git commands that were typed by hand. What
remains to be done is git's own state (``.git/rebase-merge``); ours, beside it, only remembers which
release, which patches, and which of them took what.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stack import resolutions
from stack.checkout import Checkout
from stack.errors import StackError
from stack.git import git
from stack.importing import import_series
from stack.resolutions import RERERE, Amendment, Resolutions
from stack.source import release_commit
from stack.trial import Conflict, conflicts, unmerged

STATE = "stack-rebase.json"
FORMAT = 1
BRANCH = "carried"
# Git drops the comment lines of a message when it goes on after a conflict. No line of a patch's
# message begins with this character.
MESSAGE = {"core.commentChar": "\x1f"}
# What the user's own git commands in the work repository must agree on with ours. Our own commands
# read stack/gitconfig above these.
LOCAL_CONFIG = {
    **RERERE,
    **MESSAGE,
    "merge.conflictStyle": "merge",
    "rebase.autoSquash": "false",
    "rebase.autoStash": "false",
    "commit.gpgSign": "false",
    "core.autocrlf": "false",
    "core.hooksPath": "/dev/null",
    "gc.auto": "0",
}


@dataclass
class State:
    """What a rebase in progress, or a finished one, needs besides git's own state.

    Attributes:
        origin: The release that the series comes from.
        onto: The release that it goes to.
        old_base: Commit of the old release.
        old_head: The series' last commit on it.
        new_base: Commit of the new release.
        patches: The patches' paths below ``patches/``, in order, with their old commits.
        resolutions: The folder that the recorded resolutions were read from, or empty.
        by_hand: Patches at which it stopped for a person.
        replayed: Patches that were in conflict and settled by a record.
        amended: Patches that a recorded amendment changed.
        dropped: Patches left out on purpose, now or by the record.
        stopped: The patch that waits for a person, or empty.
    """

    origin: str
    onto: str
    old_base: str
    old_head: str
    new_base: str
    patches: list[tuple[str, str]]
    resolutions: str = ""
    by_hand: list[str] = field(default_factory=list)
    replayed: list[str] = field(default_factory=list)
    amended: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    stopped: str = ""

    def patch_of(self, commit: str) -> str:
        """The patch whose old commit this is."""
        return next(patch for patch, old in self.patches if old == commit)

    def old_of(self, patch: str) -> str:
        """The old commit of a patch."""
        return dict(self.patches)[patch]


@dataclass(frozen=True)
class Stop:
    """A patch that needs a person: what git could not settle, or why nothing could be applied."""

    patch: str
    number: int
    total: int
    conflicts: tuple[Conflict, ...]
    reason: str = ""


@dataclass(frozen=True)
class Carried:
    """A patch of the finished rebase: its old commit, and the new one (``None``: left out)."""

    patch: str
    old: str
    new: str | None
    dropped: bool


def load_state(work: Path) -> State | None:
    """The state of the rebase in ``work``, or ``None`` where there is none.

    Raises:
        StackError: The folder holds something else, or a state that this version cannot read.
    """
    path = work / ".git" / STATE
    if not path.exists():
        if work.is_dir() and any(work.iterdir()):
            raise StackError(
                f"{work} is not empty and holds no rebase of the series",
                "move it away, or choose another folder with --work",
            )
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table.pop("format") != FORMAT:
            raise ValueError("unknown format")
        table["patches"] = [(patch, old) for patch, old in table["patches"]]
        return State(**table)
    except (ValueError, KeyError, TypeError) as error:
        raise StackError(
            f"{path} cannot be read: {error}", "run `python -m stack rebase --abort`"
        ) from None


def _save_state(work: Path, state: State) -> None:
    path = work / ".git" / STATE
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"format": FORMAT, **asdict(state)}, indent=1), encoding="utf-8")
    part.replace(path)


def _require(work: Path) -> State:
    state = load_state(work)
    if state is None:
        raise StackError(
            "no rebase is in progress", "start one: `python -m stack rebase --onto RELEASE`"
        )
    return state


def in_progress(work: Path) -> bool:
    """Whether git has patches left to carry."""
    return (work / ".git" / "rebase-merge").is_dir() or (work / ".git" / "rebase-apply").is_dir()


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Keep other rebases out of a work repository while this one runs.

    Raises:
        StackError: Another one is running.
    """
    work.parent.mkdir(parents=True, exist_ok=True)
    with work.with_name(f"{work.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(f"another rebase is running in {work}", "wait for it") from None
        yield


def start(
    work: Path,
    onto: str,
    *,
    checkout: Checkout | None = None,
    recorded: Path | None = None,
    sdist: Path | None = None,
) -> Stop | None:
    """Make the work repository and carry the series as far as it goes.

    Args:
        work: The folder to make; it must not exist or be empty.
        onto: The release to go to.
        checkout: Whose pin, source and series; this checkout without it.
        recorded: The folder of recorded resolutions to use, if any.
        sdist: The new release's archive; fetched without it.

    Returns:
        Where it stopped, or ``None`` where every patch is carried.

    Raises:
        StackError: A rebase is unfinished there, or a release or the series cannot be had. Then
            nothing is left behind.
    """
    checkout = checkout or Checkout()
    state = load_state(work)
    if state is not None:
        what = "is in progress" if in_progress(work) else "is finished"
        raise StackError(
            f"a rebase onto {state.onto} {what} in {work}",
            "see `python -m stack rebase --status`; `--abort` throws it away",
        )
    if onto == checkout.pin.version:
        raise StackError(f"{onto} is the pinned release", "name another one after --onto")
    made = resolutions.load(recorded) if recorded else Resolutions()
    # A folder of this name is always ours, and what a killed run left in it is of no use.
    fresh = work.with_name(f"{work.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    work.parent.mkdir(parents=True, exist_ok=True)
    try:
        state = _prepare(fresh, onto, checkout, sdist)
        state.resolutions = str(recorded) if recorded and recorded.is_dir() else ""
        resolutions.seed(fresh, made)
        _write_todo(fresh, state, made)
        _save_state(fresh, state)
        if work.is_dir():
            work.rmdir()
        fresh.rename(work)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return proceed(work)


def _prepare(work: Path, onto: str, checkout: Checkout, sdist: Path | None) -> State:
    series = import_series(work, checkout=checkout)
    new_base = release_commit(work, onto, sdist=sdist)
    for key, value in LOCAL_CONFIG.items():
        git("config", key, value, cwd=work)
    git("update-ref", f"refs/heads/release-{checkout.pin.version}", series.base, cwd=work)
    git("update-ref", f"refs/heads/release-{onto}", new_base, cwd=work)
    git("update-ref", f"refs/heads/series-{checkout.pin.version}", series.head, cwd=work)
    git("checkout", "-q", "-B", BRANCH, series.head, cwd=work)
    return State(
        origin=checkout.pin.version,
        onto=onto,
        old_base=series.base,
        old_head=series.head,
        new_base=new_base,
        patches=list(zip(series.patches, series.commits, strict=True)),
    )


def _todo_file(work: Path) -> Path:
    return work / ".git" / "stack-rebase-todo"


def _write_todo(work: Path, state: State, made: Resolutions) -> None:
    """Git's list of what to do: a pick a patch, a break where something is recorded of it."""
    lines = []
    for patch, old in state.patches:
        if resolutions.fingerprint(work, old) == made.dropped.get(patch):
            state.dropped.append(patch)
            lines.append(f"drop {old} {patch}")
            continue
        lines.append(f"pick {old} {patch}")
        if patch in made.amendments or patch in made.dropped:
            lines.append("break")
    _todo_file(work).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _rebase(work: Path, *args: str) -> None:
    """Run ``git rebase``; where it stands afterwards is read from the repository, not from here."""
    git("rebase", *args, cwd=work, config=RERERE | MESSAGE, check=False)


def proceed(work: Path) -> Stop | None:
    """Carry on from wherever git stands, until a person is needed or nothing is left to do.

    Raises:
        StackError: The rebase was taken back by other commands, or git cannot go on; the message
            says why.
    """
    state = _require(work)
    made = resolutions.load(Path(state.resolutions)) if state.resolutions else Resolutions()
    _refuse_locks(work)
    if not in_progress(work) and _head(work) == state.old_head and state.old_head != state.new_base:
        todo = shlex.quote(str(_todo_file(work).resolve()))
        # Git runs the editor through a shell: the only word in it that varies is quoted.
        git(
            *("rebase", "-i", "--empty=drop", "--onto", state.new_base, state.old_base, BRANCH),
            cwd=work,
            env={"GIT_SEQUENCE_EDITOR": f"cp -- {todo}"},
            config=RERERE | MESSAGE,
            check=False,
        )
        if not in_progress(work) and _head(work) == state.old_head:
            raise StackError("git rebase did not start", f"see `git -C {work} status`")
    before = None
    while in_progress(work):
        position = _position(work)
        if position == before:
            raise StackError(f"git rebase does not go on in {work}", f"see `git -C {work} status`")
        before = position
        stop = _settle(work, state, made)
        if stop is not None:
            if stop.patch not in state.by_hand:
                state.by_hand.append(stop.patch)
            state.stopped = stop.patch
            _save_state(work, state)
            return stop
        state.stopped = ""
        _save_state(work, state)
        _rebase(work, "--continue")
    return None


def _position(work: Path) -> tuple[str, ...]:
    """What changes whenever git rebase gets on."""
    folder = work / ".git" / "rebase-merge"
    done = (folder / "done").read_text(encoding="utf-8") if (folder / "done").exists() else ""
    return (_head(work), done, str((folder / "stopped-sha").exists()))


def _head(work: Path) -> str:
    return git("rev-parse", "HEAD", cwd=work).text


def _refuse_locks(work: Path) -> None:
    for name in ("index.lock", "HEAD.lock"):
        lock = work / ".git" / name
        if lock.exists():
            raise StackError(
                f"{lock} exists: another git runs there, or one was killed",
                f"when none runs, remove it (`rm {lock}`) and run the same command again",
            )


def _current(work: Path, state: State) -> tuple[str, bool] | None:
    """The patch that git rebase stands at, and whether it stands at the break after it."""
    done = work / ".git" / "rebase-merge" / "done"
    lines = done.read_text(encoding="utf-8").splitlines() if done.exists() else []
    at_break = bool(lines) and lines[-1].strip() in ("break", "b")
    for line in reversed(lines):
        words = line.split()
        if len(words) > 1 and words[0] in ("pick", "p"):
            full = git("rev-parse", "--verify", "-q", words[1], cwd=work, check=False).text
            if any(full == old for _, old in state.patches):
                return state.patch_of(full), at_break
    return None


def _settle(work: Path, state: State, made: Resolutions) -> Stop | None:
    """Make the place where git stands ready for ``git rebase --continue``, or say why not."""
    where = _current(work, state)
    if where is None:
        return None
    patch, at_break = where
    amendment = made.amendments.get(patch)
    if amendment and amendment.fingerprint != resolutions.fingerprint(work, state.old_of(patch)):
        amendment = None
    if at_break:
        return _amend_commit(work, state, patch, amendment)
    if _ref(work, "REBASE_HEAD") is None:
        _redo_interrupted(work, state, patch)
        return None
    left = sorted(unmerged(work))
    if state.stopped == patch:
        if left:
            return _stop(work, state, patch)
        _refuse_markers(work, patch)
        return None
    if left and not (amendment and set(left) <= set(amendment.unmerged)):
        return _stop(work, state, patch)
    resolutions.take_release_side(work, left)
    if amendment and not _amend_files(work, amendment):
        return _stop(work, state, patch, "its recorded amendment does not apply")
    for done in [state.replayed] + ([state.amended] if amendment else []):
        if patch not in done:
            done.append(patch)
    return None


def _stop(work: Path, state: State, patch: str, reason: str = "") -> Stop:
    names = [name for name, _ in state.patches]
    return Stop(patch, names.index(patch) + 1, len(names), conflicts(work), reason)


def _ref(work: Path, name: str) -> str | None:
    done = git("rev-parse", "--verify", "-q", name, cwd=work, check=False)
    return None if done.returncode else done.text


def _amend_files(work: Path, amendment: Amendment) -> bool:
    """Apply an amendment to index and files, unless it is there already (after a kill)."""
    if not amendment.diff:
        return True
    for options in (["--check", "--index"], ["--check", "--index", "-R"]):
        done = git("apply", *options, cwd=work, input=amendment.diff, check=False)
        if done.returncode == 0:
            if "-R" not in options:
                git("apply", "--index", cwd=work, input=amendment.diff)
            return True
    return False


def _amend_commit(work: Path, state: State, patch: str, amendment: Amendment | None) -> Stop | None:
    """Put a recorded amendment into the commit that git has just made of its patch."""
    if patch in state.by_hand:
        return None
    if amendment is None:
        return _stop(work, state, patch, "it changed since a resolution of it was recorded")
    if patch not in state.amended:
        git("reset", "-q", "--hard", cwd=work)
        if not _amend_files(work, amendment):
            return _stop(work, state, patch, "its recorded amendment does not apply")
        state.amended.append(patch)
    old = state.old_of(patch)
    options = ["--amend"] if _subject(work, "HEAD") == _subject(work, old) else ["-C", old]
    if options[0] == "-C" and not git("diff", "--cached", "--name-only", cwd=work).text:
        return None  # the patch came to nothing, and is left out
    git("commit", "-q", "--no-edit", "--no-verify", "--cleanup=verbatim", *options, cwd=work)
    if amendment.message:
        message = amendment.message
        commit = ("commit", "-q", "--amend", "--no-verify", "--cleanup=verbatim", "-F", "-")
        git(*commit, cwd=work, input=message)
    return None


def _subject(work: Path, commit: str) -> str:
    return git("log", "-1", "--format=%s", commit, cwd=work).text


def _redo_interrupted(work: Path, state: State, patch: str) -> None:
    """After a kill in the middle of a pick: throw the half-made files away and pick it again."""
    if not git("status", "--porcelain", cwd=work).text:
        return
    if state.stopped == patch:
        return
    git("reset", "-q", "--hard", cwd=work)
    git("clean", "-q", "-f", "-d", "-x", cwd=work)
    todo = work / ".git" / "rebase-merge" / "git-rebase-todo"
    done = work / ".git" / "rebase-merge" / "done"
    lines = done.read_text(encoding="utf-8").splitlines(keepends=True)
    rest = todo.read_text(encoding="utf-8") if todo.exists() else ""
    todo.write_text(lines[-1] + rest, encoding="utf-8")
    done.write_text("".join(lines[:-1]), encoding="utf-8")


def _refuse_markers(work: Path, patch: str) -> None:
    """Refuse to commit files in which conflict markers are left.

    A row of equals signs alone is a heading in some texts: it takes one of the other markers too.
    """
    found: dict[str, list[str]] = {}
    serious = set()
    shown = git("diff", "--check", "HEAD", cwd=work, check=False)
    for line in shown.lines:
        match = re.fullmatch(r"(.+):(\d+): leftover conflict marker", line)
        if match:
            found.setdefault(match[1], []).append(match[2])
    for path, numbers in found.items():
        lines = (work / path).read_bytes().split(b"\n")
        if any(not lines[int(number) - 1].startswith(b"=") for number in numbers):
            serious.add(path)
    if serious:
        path = sorted(serious)[0]
        raise StackError(
            f"{patch}: conflict markers are left in {path}, line {', '.join(found[path])}",
            f"edit {work / path}, then `git -C {work} add {path}`",
        )
    unstaged = git("diff", "--name-only", cwd=work).lines
    if unstaged:
        raise StackError(
            f"{patch}: {unstaged[0]} is changed but not added",
            f"`git -C {work} add {unstaged[0]}`, or `git -C {work} restore {unstaged[0]}`",
        )


def skip(work: Path) -> Stop | None:
    """Drop the patch that the rebase stopped at, and carry on."""
    state = _require(work)
    if not in_progress(work) or not state.stopped:
        raise StackError("no patch waits to be resolved", "see `python -m stack rebase --status`")
    _refuse_locks(work)
    patch = state.stopped
    state.dropped.append(patch)
    state.by_hand.remove(patch)
    state.stopped = ""
    _save_state(work, state)
    _rebase(work, "--skip")
    return proceed(work)


def status(work: Path) -> tuple[State, Stop | None]:
    """Where the rebase stands: its state, and the patch that waits for a person, if one does."""
    state = _require(work)
    if in_progress(work) and state.stopped:
        return state, _stop(work, state, state.stopped)
    return state, None


def abort(work: Path) -> State:
    """Throw the work repository away. The series, the pin and the submodule were never touched."""
    path = work / ".git" / STATE
    if not path.exists():
        load_state(work)  # names a folder that is not ours
        raise StackError("no rebase is in progress", "nothing to abort")
    try:
        state = _require(work)
    except StackError:
        state = State("", "", "", "", "", [])
    shutil.rmtree(work)
    return state


def result(work: Path) -> tuple[State, list[Carried]]:
    """The carried patches of a finished rebase, in order.

    Raises:
        StackError: It is not finished or was taken back, or a commit on the new release cannot be
            told to be one of the patches.
    """
    state = _require(work)
    if in_progress(work):
        raise StackError(
            f"the rebase onto {state.onto} is not finished",
            "run `python -m stack rebase --continue`",
        )
    head = git("rev-parse", f"refs/heads/{BRANCH}", cwd=work).text
    below = git("merge-base", "--is-ancestor", state.new_base, head, cwd=work, check=False)
    if below.returncode:
        raise StackError(
            f"branch {BRANCH} in {work} is not on {state.onto}: the rebase was taken back",
            "`python -m stack rebase --abort`, then start again",
        )
    by_subject: dict[str, str] = {}
    for commit in git("rev-list", "--reverse", f"{state.new_base}..{head}", cwd=work).lines:
        by_subject[_subject(work, commit)] = commit
    carried = []
    for patch, old in state.patches:
        new = by_subject.pop(_subject(work, old), None)
        # A conflict that a person settled with nothing left is a drop as well.
        dropped = patch in state.dropped or (new is None and patch in state.by_hand)
        carried.append(Carried(patch, old, new, dropped))
    if by_subject:
        subject, commit = next(iter(by_subject.items()))
        raise StackError(
            f"commit {commit[:12]} ({subject!r}) in {work} is none of the series' patches",
            "squash it into its patch (`git rebase -i --autosquash`), and keep the subjects",
        )
    return state, carried


def shown_path(work: Path) -> str:
    """The work repository as to be typed: relative where that is shorter."""
    relative = os.path.relpath(work)
    return relative if len(relative) < len(str(work)) else str(work)
