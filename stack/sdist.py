"""Read a release's sdist: its files, and which of them upstream's repository is known to hold.

An sdist is upstream's tracked files plus what the packaging adds. What it adds cannot be told from
the archive alone, so three rules, each with a reason, say what is left out. They are applied to any
release in the same way.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stack.errors import StackError
from stack.git import git

# Path pattern -> reason. Upstream's .gitignore is the third rule; it is read from the archive.
GENERATED = {
    r"PKG-INFO|setup\.cfg|[^/]+\.egg-info/.*": "setuptools writes it when it makes an sdist",
    r"vllm/_version\.py": "setuptools-scm writes it when it makes an sdist",
}
IGNORED = "matches upstream's own .gitignore: may be tracked, may be left over from the build"


@dataclass(frozen=True)
class File:
    """A file of a release: its git mode (``100644`` or ``100755``) and its git blob id."""

    mode: str
    blob: str


@dataclass(frozen=True)
class Contents:
    """An sdist's files by path. ``excluded`` maps a path that is left out to the reason."""

    files: dict[str, File]
    excluded: dict[str, str]


def blob_id(data: bytes) -> str:
    """The id that git gives these bytes (SHA-1 object format)."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def read(sdist: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield (path below the top folder, git mode, contents) for each file of an sdist.

    Nothing is written to disk. A mode is 100755 where the owner may execute, else 100644: the group
    and other bits of the archive come from the machine that made it.

    Raises:
        StackError: The archive is broken, has more than one top folder, holds a path that is
            absolute, leads upwards or comes twice, or an entry that is no plain file or folder.
    """
    tops: set[str] = set()
    seen: set[str] = set()
    try:
        with tarfile.open(sdist, "r:gz") as archive:
            for member in archive:
                parts = member.name.split("/")
                unsafe = {"", ".", "..", ".git"} & set(parts) or not member.name.isprintable()
                if unsafe:
                    raise StackError(f"{sdist.name}: unsafe path {member.name!r}", _hint(sdist))
                tops.add(parts[0])
                if len(tops) > 1:
                    raise StackError(
                        f"{sdist.name}: more than one top folder: {', '.join(sorted(tops))}",
                        _hint(sdist),
                    )
                if member.isdir():
                    continue
                path = "/".join(parts[1:])
                if not member.isreg() or not path:
                    raise StackError(
                        f"{sdist.name}: {member.name} is not a plain file", _hint(sdist)
                    )
                if path in seen:
                    raise StackError(f"{sdist.name}: {path} comes twice", _hint(sdist))
                seen.add(path)
                content = archive.extractfile(member)
                assert content is not None  # a plain file always has contents
                yield path, "100755" if member.mode & 0o100 else "100644", content.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise StackError(f"{sdist}: cannot be read: {error}", _hint(sdist)) from None


def _hint(sdist: Path) -> str:
    return f"delete {sdist} and run the command again"


def contents(sdist: Path) -> Contents:
    """Read an sdist and apply the rules to it."""
    ignore_files: dict[str, bytes] = {}
    files: dict[str, File] = {}
    for path, mode, data in read(sdist):
        if path.rpartition("/")[2] == ".gitignore":
            ignore_files[path] = data
        files[path] = File(mode, blob_id(data))
    excluded = _exclusions(files, ignore_files)
    kept = {path: files[path] for path in sorted(files) if path not in excluded}
    return Contents(kept, excluded)


def _exclusions(paths: dict[str, File], ignore_files: dict[str, bytes]) -> dict[str, str]:
    reasons = dict.fromkeys(_ignored(paths, ignore_files), IGNORED)
    for path in paths:
        for pattern, reason in GENERATED.items():
            if re.fullmatch(pattern, path):
                reasons[path] = reason
    return dict(sorted(reasons.items()))


def _ignored(paths: dict[str, File], ignore_files: dict[str, bytes]) -> list[str]:
    """Ask git which paths upstream's ignore files match, in a folder that holds only these."""
    with tempfile.TemporaryDirectory(prefix="sm12x-ignore-") as name:
        folder = Path(name)
        git("init", "-q", "--template=", cwd=folder)
        for path, data in ignore_files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        done = git(
            *("check-ignore", "--no-index", "-z", "--stdin"),
            cwd=folder,
            input="\0".join(paths),
            check=False,
        )
        # 1 says that no path is ignored.
        if done.returncode not in (0, 1):
            raise StackError(f"git check-ignore failed: {done.last_error}")
        return done.fields
