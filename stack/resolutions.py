"""Resolutions of a rebase, kept in this repository, so that it runs again without hands.

What is kept for one move of the series, in ``carried/RELEASE/resolutions/``:

* ``rr-cache/``: git rerere's own records, a preimage and a postimage for each file that was in
  conflict. Git recognises the conflict by its text, whatever else changed in the file.
* ``amendments/``: what rerere cannot hold, as a diff a patch: a file that upstream deleted or
  moved, and edits outside the files in conflict (a hook that moved to another file).
* ``record.json``: which patch has an amendment or another message, and which was dropped.

An amendment, or a drop, holds for the very patch that it was made for: the record has a fingerprint
of the patch's diff, and another diff makes the rebase stop as though nothing were recorded.

All of it is learned from the carried commits themselves, by doing each merge again: it does not
matter by which commands the conflicts were resolved.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from stack.errors import StackError
from stack.git import git
from stack.trial import diff_of, unmerged

RECORD = "record.json"
RERERE = {"rerere.enabled": "true", "rerere.autoUpdate": "true"}
_ID = re.compile(r"[0-9a-f]{40}")
_IMAGE = re.compile(r"(pre|post)image(\.\d+)?")


@dataclass(frozen=True)
class Amendment:
    """What to change after git's merge of a patch.

    Attributes:
        fingerprint: Of the patch that it was made for.
        unmerged: Files in conflict that rerere cannot settle: the release's state is taken.
        diff: What is changed then, for ``git apply``; may be empty.
        message: The commit's message, where it is no longer the patch's; else empty.
    """

    fingerprint: str
    unmerged: tuple[str, ...]
    diff: bytes
    message: str = ""


@dataclass
class Resolutions:
    """Everything recorded of one move, by the patch's path below ``patches/``.

    Attributes:
        amendments: The amendments.
        dropped: Fingerprints of the patches that were dropped.
        rerere: rerere's files: path below ``rr-cache/`` -> contents.
        conflicts: Patches whose merge was in conflict (learned, not kept).
    """

    amendments: dict[str, Amendment] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    rerere: dict[str, bytes] = field(default_factory=dict)
    conflicts: tuple[str, ...] = ()


def fingerprint(work: Path, commit: str) -> str:
    """SHA-256 of a commit's diff without line numbers and blob ids, as 64 hex digits.

    Unlike ``git patch-id`` it heeds whitespace, which is code in Python.
    """
    lines = [
        re.sub(rb"^@@ .*? @@.*", b"@@", line)
        for line in diff_of(work, commit).split(b"\n")
        if not line.startswith(b"index ")
    ]
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def message_of(work: Path, commit: str) -> str:
    """A commit's message, with one newline at the end."""
    return git("log", "-1", "--format=%B", commit, cwd=work).text.rstrip("\n") + "\n"


def load(folder: Path) -> Resolutions:
    """Read what ``save`` wrote; a folder that does not exist holds nothing.

    Raises:
        StackError: A file is missing or malformed; the message names it.
    """
    if not folder.is_dir():
        return Resolutions()
    path = folder / RECORD
    hint = f"restore {folder} from git, or run the rebase with --no-replay"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        amendments = {
            patch: Amendment(
                _text(entry["fingerprint"]),
                tuple(_text(name) for name in entry["unmerged"]),
                (folder / _amendment_file(patch)).read_bytes(),
                _text(entry["message"]),
            )
            for patch, entry in record["amendments"].items()
        }
        dropped = {patch: _text(value) for patch, value in record["dropped"].items()}
    except FileNotFoundError as error:
        raise StackError(f"{error.filename} does not exist", hint) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StackError(f"{path} is malformed: {error!r}", hint) from None
    rerere = {}
    for file in sorted((folder / "rr-cache").glob("*/*")):
        name = f"{file.parent.name}/{file.name}"
        if not (_ID.fullmatch(file.parent.name) and _IMAGE.fullmatch(file.name)):
            raise StackError(f"{file} is no record of git rerere", hint)
        rerere[name] = file.read_bytes()
    return Resolutions(amendments, dropped, rerere)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _amendment_file(patch: str) -> str:
    if patch.startswith("/") or ".." in patch.split("/") or not patch.endswith(".patch"):
        raise ValueError(f"{patch!r} is no path of a patch")
    return f"amendments/{patch.removesuffix('.patch')}.diff"


def save(folder: Path, made: Resolutions) -> None:
    """Replace ``folder`` with the given resolutions; without any, remove it."""
    shutil.rmtree(folder, ignore_errors=True)
    if not (made.amendments or made.dropped or made.rerere):
        return
    files = {f"rr-cache/{name}": data for name, data in made.rerere.items()}
    files |= {_amendment_file(patch): each.diff for patch, each in made.amendments.items()}
    record = {
        "amendments": {
            patch: {
                "fingerprint": each.fingerprint,
                "unmerged": list(each.unmerged),
                "message": each.message,
            }
            for patch, each in sorted(made.amendments.items())
        },
        "dropped": dict(sorted(made.dropped.items())),
    }
    files[RECORD] = (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def seed(work: Path, made: Resolutions) -> None:
    """Give a repository rerere's records."""
    cache = work / ".git" / "rr-cache"
    for name, data in made.rerere.items():
        path = cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def take_release_side(work: Path, paths: Sequence[str]) -> None:
    """Settle files in conflict as the release has them: its contents, or no file."""
    stages = unmerged(work)
    for path in paths:
        if 2 in stages[path]:
            git("checkout", "--ours", "--", path, cwd=work)
            git("add", "--", path, cwd=work)
        else:
            git("rm", "-q", "--cached", "--", path, cwd=work)
            (work / path).unlink(missing_ok=True)


def learn(work: Path, pairs: Sequence[tuple[str, str, str | None]]) -> Resolutions:
    """Find out what it takes to get from the old commits to the carried ones.

    Args:
        work: The repository of the rebase; its files, index and refs are left alone.
        pairs: For each patch its path, its commit on the old release, and its commit on the new
            one, or ``None`` where it was dropped on purpose.
    """
    made = Resolutions()
    conflicts = []
    with _scratch(work) as scratch:
        for patch, old, new in pairs:
            print_ = fingerprint(work, old)
            if new is None:
                made.dropped[patch] = print_
                continue
            git("reset", "-q", "--hard", f"{new}^", cwd=scratch)
            done = git("cherry-pick", "--no-commit", old, cwd=scratch, config=RERERE, check=False)
            stages = unmerged(scratch)
            if done.returncode and not stages:
                raise StackError(f"{patch}: git cherry-pick failed: {done.last_error}")
            if stages:
                conflicts.append(patch)
            settled = _teach(scratch, new, stages)
            rest = sorted(set(stages) - settled)
            take_release_side(scratch, rest)
            merged = git("write-tree", cwd=scratch).text
            diff = git(
                *("diff", "--full-index", "--binary", "--no-renames", merged, new), cwd=scratch
            ).stdout
            message = message_of(scratch, new)
            if message == message_of(scratch, old):
                message = ""
            if rest or diff or message:
                made.amendments[patch] = Amendment(print_, tuple(rest), diff, message)
        made.rerere = dict(_records(scratch / ".git" / "rr-cache"))
    made.conflicts = tuple(conflicts)
    return made


def _teach(scratch: Path, new: str, stages: Mapping[str, object]) -> set[str]:
    """Show rerere how commit ``new`` settled the conflicts; return the files that it took."""
    listing = scratch / ".git" / "MERGE_RR"
    entries = listing.read_bytes().split(b"\0") if stages and listing.exists() else []
    settled = set()
    for entry in filter(None, entries):
        path = entry.partition(b"\t")[2].decode("utf-8", "surrogateescape")
        kind = git("cat-file", "-t", f"{new}:{path}", cwd=scratch, check=False)
        if path in stages and kind.text == "blob":
            git("checkout", new, "--", path, cwd=scratch)
            settled.add(path)
    if settled:
        git("rerere", cwd=scratch, config=RERERE)
    return settled


def _records(cache: Path) -> Iterator[tuple[str, bytes]]:
    """rerere's complete records: a preimage without its postimage resolves nothing."""
    for post in sorted(cache.glob("*/postimage*")):
        pre = post.with_name(post.name.replace("post", "pre", 1))
        for file in (pre, post):
            yield f"{file.parent.name}/{file.name}", file.read_bytes()


@contextmanager
def _scratch(work: Path) -> Iterator[Path]:
    """A repository with the objects of ``work`` and no rerere records, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="sm12x-learn-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder) / "repository"
        scratch.mkdir()
        git("init", "-q", "--template=", cwd=scratch)
        objects = (work / ".git" / "objects").resolve()
        alternates = scratch / ".git" / "objects" / "info" / "alternates"
        alternates.parent.mkdir(parents=True, exist_ok=True)
        alternates.write_text(f"{objects}\n", encoding="utf-8")
        git("config", "core.bare", "false", cwd=scratch)
        yield scratch
