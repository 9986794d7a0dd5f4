"""What a patch file says of itself: subject, reason, trailers, and the files it changes."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from email import message_from_bytes
from email.errors import MessageError
from email.header import decode_header, make_header
from functools import cached_property
from pathlib import Path

from stack.errors import StackError
from stack.git import git

TRAILERS = ("Kind", "Scope", "Upstream", "Drop-when", "Depends", "Tests")
KINDS = ("core", "fix", "tune", "compat")
NONE = "none"
_PREFIX = re.compile(r"\[PATCH[^\]]*\]\s*")
_HUNK = re.compile(rb"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")


@dataclass(frozen=True)
class Change:
    """A file that a patch touches, with the lines it adds and removes.

    ``added`` holds the added lines' bytes; it is empty for a binary file.
    """

    path: str
    hunks: int
    added: tuple[bytes, ...]
    removed: int


@dataclass(frozen=True)
class Patch:
    """A patch of the series. ``name`` is its path below ``patches/``; ``raw`` the file's bytes."""

    name: str
    raw: bytes

    @cached_property
    def _mail(self) -> tuple[str, str]:
        try:
            headers = dict(message_from_bytes(self.raw).raw_items())
            # Bytes above 127 come as surrogates.
            raw_subject = str(headers.get("Subject", "")).encode("utf-8", "surrogateescape")
            decoded = str(make_header(decode_header(raw_subject.decode("utf-8", "replace"))))
        except (MessageError, LookupError, UnicodeDecodeError) as error:
            raise StackError(
                f"patches/{self.name}: the mail header cannot be read: {error}",
                "write it as `git format-patch` does",
            ) from None
        subject = re.sub(r"\s*\n\s*", " ", decoded)
        _, _, body = self.raw.partition(b"\n\n")
        text = body.decode("utf-8", "replace")
        message = re.split(r"^(?:---\s*$|diff --git |Index: )", text, maxsplit=1, flags=re.M)[0]
        return _PREFIX.sub("", subject, count=1), message.strip("\n")

    @property
    def subject(self) -> str:
        """The subject without ``[PATCH]``, on one line."""
        return self._mail[0]

    @cached_property
    def trailers(self) -> dict[str, list[str]]:
        """The trailers by name, as ``git interpret-trailers`` reads them, in the file's order."""
        text = f"{self.subject}\n\n{self._mail[1]}\n"
        with tempfile.TemporaryDirectory(prefix="sm12x-trailers-") as folder:
            parsed = git("interpret-trailers", "--parse", cwd=Path(folder), input=text)
        found: dict[str, list[str]] = {}
        for line in parsed.lines:
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), []).append(value.strip())
        return found

    @property
    def reason(self) -> str:
        """The message between the subject and the trailers."""
        paragraphs = re.split(r"\n{2,}", self._mail[1])
        if self.trailers:
            paragraphs = paragraphs[:-1]
        return "\n\n".join(paragraphs).strip()

    def values(self, trailer: str) -> list[str]:
        """The entries of a trailer that lists things, split at commas; ``none`` gives no entry.

        ``Tests: none`` has no meaning and stays an entry, so that it is reported as a missing path.
        """
        entries = [
            entry.strip()
            for value in self.trailers.get(trailer, [])
            for entry in value.split(",")
            if entry.strip()
        ]
        return [] if entries == [NONE] and trailer != "Tests" else entries

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """The files that the patch touches, in its order.

        Raises:
            StackError: The diff is broken, or there is none.
        """
        with tempfile.TemporaryDirectory(prefix="sm12x-diff-") as name:
            folder = Path(name)
            (folder / "patch").write_bytes(self.raw)
            shown = git("apply", "--numstat", "-z", "patch", cwd=folder, check=False)
        if shown.returncode:
            raise StackError(
                f"patches/{self.name}: {shown.last_error}",
                "export it again, or restore the file from the project's history",
            )
        paths = [field.split("\t", 2)[2] for field in shown.fields]
        bodies = list(_file_bodies(self.raw))
        if len(bodies) != len(paths):
            raise StackError(
                f"patches/{self.name}: {len(bodies)} `diff --git` headers for {len(paths)} files",
                "export it again: rename and copy headers are not used in this series",
            )
        return tuple(_change(path, body) for path, body in zip(paths, bodies, strict=True))

    @property
    def paths(self) -> list[str]:
        """The paths of the files that the patch touches."""
        return [change.path for change in self.changes]


def load(patches: Path, name: str) -> Patch:
    """Read the patch ``name`` of the folder ``patches``.

    Raises:
        StackError: The file cannot be read.
    """
    try:
        return Patch(name, (patches / name).read_bytes())
    except OSError as error:
        raise StackError(
            f"patches/{name}: {error.strerror}", "restore the file, or take its line out of series"
        ) from None


def slug(subject: str) -> str:
    """The file name of a patch without its ending: git's ``%f`` of the subject, at any length.

    Letters, digits, dots and underscores stay; every run of other bytes becomes one hyphen; runs of
    dots become one; hyphens and dots at the end go.
    """
    text = re.sub(r"[^A-Za-z0-9._]+", "-", subject)
    text = re.sub(r"\.+", ".", text).lstrip("-")
    return text.rstrip(".-")


def _file_bodies(raw: bytes) -> list[list[bytes]]:
    """The lines of each file's part of the diff. Hunks are skipped by their counts."""
    bodies: list[list[bytes]] = []
    old = new = 0
    for line in raw.split(b"\n"):
        if old > 0 or new > 0:
            bodies[-1].append(line)
            old -= line[:1] in (b" ", b"-", b"")
            new -= line[:1] in (b" ", b"+", b"")
        elif line.startswith(b"diff --git "):
            bodies.append([])
        elif bodies:
            bodies[-1].append(line)
            if match := _HUNK.match(line):
                old, new = (int(count) if count is not None else 1 for count in match.groups())
    return bodies


def _change(path: str, body: list[bytes]) -> Change:
    hunks = removed = old = new = 0
    added = []
    for line in body:
        if old > 0 or new > 0:
            if line.startswith(b"+"):
                added.append(line[1:])
            removed += line.startswith(b"-")
            old -= line[:1] in (b" ", b"-", b"")
            new -= line[:1] in (b" ", b"+", b"")
        elif match := _HUNK.match(line):
            hunks += 1
            old, new = (int(count) if count is not None else 1 for count in match.groups())
    return Change(path, hunks, tuple(added), removed)
