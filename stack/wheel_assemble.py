"""Make one wheel: upstream's binaries, the patched files, our kernels, and metadata redone."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stack import wheel_metadata
from stack.errors import StackError
from stack.wheel_changes import Change
from stack.wheel_metadata import encode_hash, record_hash
from stack.wheel_zip import ZipWriter

CHUNK = 1 << 20
VERSION_FILE = "vllm/_version.py"
PLAIN = stat.S_IFREG | 0o644
EXECUTABLE = stat.S_IFREG | 0o755


@dataclass(frozen=True)
class Assembled:
    """A finished wheel, its SHA-256, and which members are not upstream's bytes."""

    path: Path
    sha256: str
    size: int
    replaced: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]


def assemble(
    source: Path,
    out: Path,
    *,
    old_version: str,
    version: str,
    note: str,
    changes: Sequence[Change],
    kernels: Mapping[str, bytes],
    licence: bytes,
) -> Assembled:
    """Write the wheel into ``out`` and read it back against its own RECORD.

    Members that do not change are copied with their compressed bytes; new ones are stored without
    compression and bear the date of upstream's METADATA. The result depends on the arguments alone.

    Args:
        source: The wheel that brings the binaries; its digest was checked by the caller.
        out: A folder; it is made where it is missing.
        old_version: The version of ``source``.
        version: The version to give.
        note: A paragraph that heads the description.
        changes: What goes into the wheel (:func:`stack.wheel_changes.sort_out`).
        kernels: Files of our package by their path in the wheel (``vllm_sm12x/…``).
        licence: Our licence file.

    Raises:
        StackError: ``source`` is not the wheel of the release that the changes belong to, two
            inputs bring the same file, or the disk does not let us. No half-made wheel is left.
    """
    target = out / wheel_metadata.renamed(source.name, version)
    try:
        with zipfile.ZipFile(source) as upstream, _whole_file(target) as file:
            plan = _plan(
                upstream,
                target.name,
                old_version=old_version,
                version=version,
                note=note,
                changes=changes,
                kernels=kernels,
                licence=licence,
            )
            writer = ZipWriter(file)
            for member in plan.members:
                if isinstance(member, zipfile.ZipInfo):
                    writer.copy(upstream, member)
                else:
                    writer.store(member.name, member.data, plan.date_time, member.mode)
            writer.close()
            file.flush()
            verify(file, plan.record)
            file.seek(0)
            digest = hashlib.sha256()
            while chunk := file.read(CHUNK):
                digest.update(chunk)
            size = file.tell()
    except zipfile.BadZipFile as error:
        raise StackError(f"{source.name} is no wheel: {error}", "remove it and run again") from None
    return Assembled(
        path=target,
        sha256=digest.hexdigest(),
        size=size,
        replaced=plan.replaced,
        added=plan.added,
        removed=plan.removed,
    )


@dataclass(frozen=True)
class _New:
    name: str
    data: bytes
    mode: int = PLAIN


@dataclass(frozen=True)
class _Plan:
    members: list[zipfile.ZipInfo | _New]
    record: dict[str, tuple[str, str]]
    date_time: tuple[int, int, int, int, int, int]
    replaced: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]


def _plan(
    upstream: zipfile.ZipFile,
    filename: str,
    *,
    old_version: str,
    version: str,
    note: str,
    changes: Sequence[Change],
    kernels: Mapping[str, bytes],
    licence: bytes,
) -> _Plan:
    """Decide on every member of the wheel, in order, and on its RECORD."""
    infos = {info.filename: info for info in upstream.infolist()}
    if len(infos) != len(upstream.infolist()):
        raise StackError(f"{upstream.filename} has a file twice", "is it the pinned wheel?")
    old_info = wheel_metadata.dist_info(infos)
    record = wheel_metadata.read_record(upstream.read(f"{old_info}/RECORD"))
    if set(record) != set(infos):
        odd = sorted(set(record) ^ set(infos))[0]
        raise StackError(f"RECORD and content of {upstream.filename} differ: {odd}", "is it whole?")

    new_files = {
        VERSION_FILE: wheel_metadata.version_file(
            upstream.read(VERSION_FILE), old=old_version, new=version
        )
    }
    changed = {change.path: change for change in changes}
    for change in changes:
        _check_old(change, upstream, infos)
        if change.new is not None:
            new_files[change.path] = change.new
    removed = tuple(change.path for change in changes if change.new is None)
    for path in kernels:
        if path in infos or path in new_files:
            raise StackError(f"{path} is in upstream's wheel already", "rename it under kernels/")

    def mode(path: str) -> int:
        if path in changed:
            return EXECUTABLE if changed[path].executable else PLAIN
        return infos[path].external_attr >> 16

    members: list[zipfile.ZipInfo | _New] = []
    package = [path for path in infos if not path.startswith(f"{old_info}/")]
    for path in package:
        if path in new_files:
            members.append(_New(path, new_files[path], mode(path)))
        elif path not in removed:
            members.append(infos[path])
    added = sorted([*(path for path in new_files if path not in infos), *kernels])
    for path in added:
        if path in kernels:
            members.append(_New(path, kernels[path]))
        else:
            members.append(_New(path, new_files[path], mode(path)))

    new_info = f"{old_info.partition('-')[0]}-{version}.dist-info"
    redone = {
        "METADATA": lambda data: wheel_metadata.metadata(
            data, old=old_version, new=version, note=note
        ),
        "WHEEL": lambda data: wheel_metadata.wheel_file(filename),
        "top_level.txt": wheel_metadata.top_level,
    }
    for path in infos:
        name = path.removeprefix(f"{old_info}/")
        if name == path or name in ("RECORD", "RECORD.jws", "RECORD.p7s"):
            continue
        data = upstream.read(path)
        members.append(_New(f"{new_info}/{name}", redone.get(name, bytes)(data)))
    members.append(_New(f"{new_info}/licenses/{wheel_metadata.LICENCE_PATH}", licence))

    rows: dict[str, tuple[str, str]] = {}
    for member in members:
        if isinstance(member, zipfile.ZipInfo):
            rows[member.filename] = record[member.filename]
        else:
            rows[member.name] = (record_hash(member.data), str(len(member.data)))
    record_path = f"{new_info}/RECORD"
    members.append(_New(record_path, wheel_metadata.write_record(rows, record_path)))
    return _Plan(
        members=members,
        record=rows | {record_path: ("", "")},
        date_time=infos[f"{old_info}/METADATA"].date_time,
        replaced=tuple(path for path in package if path in new_files),
        added=tuple(added),
        removed=removed,
    )


def _check_old(
    change: Change, upstream: zipfile.ZipFile, infos: Mapping[str, zipfile.ZipInfo]
) -> None:
    """Compare the wheel with what the patches were written against."""
    there = change.path in infos
    if change.old is None and there:
        raise StackError(
            f"{change.who} adds {change.path}, which upstream's build puts into the wheel",
            "choose another name for the file",
        )
    if change.old is not None and not there:
        raise StackError(
            f"{change.who} changes {change.path}, which upstream's wheel does not have",
            "the sources and the wheel in upstream.toml are not of one release, or the file is no "
            "part of a wheel: then list it in stack/wheel_changes.py",
        )
    if change.old is not None and upstream.read(change.path) != change.old:
        raise StackError(
            f"{change.path} (changed by {change.who}) differs between the source and upstream's "
            "wheel",
            "are the sources and the wheel in upstream.toml of one release?",
        )


def verify(file: BinaryIO, record: Mapping[str, tuple[str, str]]) -> None:
    """Read a wheel back: its members are those of ``record``, each with its digest and size.

    ``zipfile`` checks each member's CRC on the way.

    Raises:
        StackError: A member is missing, is not listed, or is not what the record says.
    """
    hint = "this is a fault of stack/wheel_assemble.py: please report it"
    with zipfile.ZipFile(file) as made:
        names = made.namelist()
        if sorted(names) != sorted(record):
            odd = sorted(set(names) ^ set(record)) or ["a file comes twice"]
            raise StackError(f"the new wheel and its RECORD differ: {odd[0]}", hint)
        for info in made.infolist():
            told, size = record[info.filename]
            if not told and info.filename.endswith(".dist-info/RECORD"):
                continue
            digest = hashlib.sha256()
            with made.open(info) as member:
                while chunk := member.read(CHUNK):
                    digest.update(chunk)
            if (encode_hash(digest.digest()), str(info.file_size)) != (told, size):
                raise StackError(f"{info.filename} is not what the new wheel's RECORD says", hint)


@contextmanager
def _whole_file(target: Path) -> Iterator[BinaryIO]:
    """A file that takes its name only once the block has ended well.

    The unfinished file is locked: a second build of the same wheel stops instead of writing into
    it, and what a killed build left is written over.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StackError(
                    f"another run is writing {target.name}", "wait for it, or choose another --out"
                ) from None
            try:
                file.truncate()
                yield file
                file.flush()
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            part.replace(target)
    except OSError as error:
        raise disk_error(error, target.parent) from None


def disk_error(error: OSError, folder: Path) -> StackError:
    """What the operating system says of the folder of wheels, in one line for people."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StackError(
            f"no space left in {folder}: a wheel takes about 270 MB",
            "free some space there, or choose another folder with --out; then run again",
        )
    return StackError(
        f"{error.filename or folder} cannot be written: {error.strerror or error}",
        "mend that, or choose another folder with --out",
    )
