"""Write a zip archive whose unchanged members are copied as they lie in another one.

Python's ``zipfile`` can only decompress and compress again, which for vLLM's wheel takes a minute
and gives other bytes with each zlib. Here a member is either copied (its compressed bytes as they
are) or stored without compression, so that the archive depends on its inputs alone. Offsets and
sizes are the zip format's (APPNOTE 6.3, sections 4.3 and 4.5.3); ``zipfile`` reads the other
archive's directory, and what was written is read back with it.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from stack.errors import StackError

# In a classic field these say that zip64's field has the value.
MARK = 0xFFFFFFFF
COUNT_MARK = 0xFFFF
# The first values that the classic fields cannot hold. Tests lower them.
LIMIT = MARK
COUNT_LIMIT = COUNT_MARK
CHUNK = 1 << 20

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")

UNIX = 3
UTF8 = 0x800
DATA_DESCRIPTOR = 0x8
ENCRYPTED = 0x1
VERSION_PLAIN, VERSION_64 = 20, 45


@dataclass(frozen=True)
class _Written:
    name: bytes
    flags: int
    method: int
    time: int
    date: int
    crc: int
    packed: int
    size: int
    attributes: int
    offset: int


def _dos(date_time: tuple[int, int, int, int, int, int]) -> tuple[int, int]:
    year, month, day, hour, minute, second = date_time
    return hour << 11 | minute << 5 | second // 2, (year - 1980) << 9 | month << 5 | day


def _classic(value: int) -> int:
    return MARK if value >= LIMIT else value


def _extra64(*values: int) -> bytes:
    """The zip64 extra field with those of ``values`` that the classic fields cannot hold."""
    large = [value for value in values if value >= LIMIT]
    return struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""


class ZipWriter:
    """An archive being written to ``file``, from where that stands; ``close`` ends it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.members: dict[str, _Written] = {}

    def store(
        self, name: str, data: bytes, date_time: tuple[int, int, int, int, int, int], mode: int
    ) -> None:
        """Add a member without compression; ``mode`` as of ``os.stat`` (``0o100644``)."""
        self._header(
            name, zipfile.ZIP_STORED, date_time, zlib.crc32(data), len(data), len(data), mode
        )
        self.file.write(data)

    def copy(self, source: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        """Add a member of another archive with its compressed bytes, date and mode as they are.

        Raises:
            StackError: The member's two headers differ, it is encrypted, or its bytes end early.
        """
        mode = info.external_attr >> 16
        packed = info.compress_size
        self._header(
            info.filename,
            info.compress_type,
            info.date_time,
            info.CRC,
            packed,
            info.file_size,
            mode,
        )
        for piece in raw(source, info):
            self.file.write(piece)
            packed -= len(piece)
        assert packed == 0, "raw() gives exactly the member's bytes"

    def _header(
        self,
        name: str,
        method: int,
        date_time: tuple[int, int, int, int, int, int],
        crc: int,
        packed: int,
        size: int,
        mode: int,
    ) -> None:
        if name in self.members:
            raise StackError(
                f"{name} would be twice in the wheel", "two inputs bring the same file"
            )
        time, date = _dos(date_time)
        entry = _Written(
            name=name.encode("utf-8"),
            flags=0 if name.isascii() else UTF8,
            method=method,
            time=time,
            date=date,
            crc=crc,
            packed=packed,
            size=size,
            attributes=mode << 16,
            offset=self.file.tell(),
        )
        # A local header carries both sizes or none.
        extra = b""
        if packed >= LIMIT or size >= LIMIT:
            extra = struct.pack("<2H2Q", 1, 16, size, packed)
        self.file.write(
            _LOCAL.pack(
                b"PK\3\4",
                VERSION_64 if extra else VERSION_PLAIN,
                entry.flags,
                method,
                time,
                date,
                crc,
                MARK if extra else packed,
                MARK if extra else size,
                len(entry.name),
                len(extra),
            )
            + entry.name
            + extra
        )
        self.members[name] = entry

    def close(self) -> None:
        """Write the directory. The file itself stays open."""
        start = self.file.tell()
        for entry in self.members.values():
            extra = _extra64(entry.size, entry.packed, entry.offset)
            version = VERSION_64 if extra else VERSION_PLAIN
            self.file.write(
                _CENTRAL.pack(
                    b"PK\1\2",
                    UNIX << 8 | version,
                    version,
                    entry.flags,
                    entry.method,
                    entry.time,
                    entry.date,
                    entry.crc,
                    _classic(entry.packed),
                    _classic(entry.size),
                    len(entry.name),
                    len(extra),
                    0,
                    0,
                    0,
                    entry.attributes,
                    _classic(entry.offset),
                )
                + entry.name
                + extra
            )
        end = self.file.tell()
        count, size = len(self.members), end - start
        if count >= COUNT_LIMIT or size >= LIMIT or start >= LIMIT:
            made = UNIX << 8 | VERSION_64
            self.file.write(
                _END64.pack(b"PK\6\6", 44, made, VERSION_64, 0, 0, count, count, size, start)
                + _LOCATOR.pack(b"PK\6\7", 0, end, 1)
            )
        few = COUNT_MARK if count >= COUNT_LIMIT else count
        self.file.write(_END.pack(b"PK\5\6", 0, 0, few, few, _classic(size), _classic(start), 0))


def raw(source: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """The compressed bytes of a member, in pieces of at most one MiB.

    Raises:
        StackError: The member's local header is not what the archive's directory says, the member
            is encrypted, or the archive ends inside it.
    """
    name = f"{info.filename} in {source.filename}"
    hint = "the archive is damaged; download it again"
    file = source.fp
    if file is None:
        raise ValueError("source is closed")
    file.seek(info.header_offset)
    header = file.read(_LOCAL.size)
    if len(header) != _LOCAL.size or header[:4] != b"PK\3\4":
        raise StackError(f"{name} has no local header", hint)
    _, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack(header)
    stored_name = file.read(name_length)
    if stored_name != info.orig_filename.encode("utf-8" if flags & UTF8 else "cp437"):
        raise StackError(f"{name} is called {stored_name!r} in its local header", hint)
    if flags & ENCRYPTED:
        raise StackError(f"{name} is encrypted", hint)
    described = not flags & DATA_DESCRIPTOR and packed != MARK and size != MARK
    told = (info.compress_type, info.CRC, info.compress_size, info.file_size)
    if method != told[0] or (described and (crc, packed, size) != told[1:]):
        raise StackError(f"{name} differs between its local header and the directory", hint)
    file.seek(extra_length, 1)
    left = info.compress_size
    while left:
        piece = file.read(min(CHUNK, left))
        if not piece:
            raise StackError(f"{name} ends early", hint)
        left -= len(piece)
        yield piece
