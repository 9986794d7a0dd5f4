"""The zip writer: archives that ``zipfile`` and ``unzip`` read, zip64 among them."""

from __future__ import annotations

import io
import shutil
import subprocess
import zipfile

import pytest

from stack import wheel_zip
from stack.errors import StackError
from stack.wheel_zip import ZipWriter

DATE = (2026, 6, 4, 21, 44, 30)


def archive(members: dict[str, bytes], method=zipfile.ZIP_DEFLATED, file=None) -> zipfile.ZipFile:
    file = file or io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, DATE)
            info.external_attr = 0o100640 << 16
            info.compress_type = method
            made.writestr(info, data)
    return zipfile.ZipFile(file)


MEMBERS = {"a": b"a" * 5000, "größe": b"", "folder/b": bytes(range(256)) * 9}


@pytest.mark.parametrize("limit", [wheel_zip.LIMIT, 3000, 200, 1])
@pytest.mark.parametrize("count_limit", [wheel_zip.COUNT_LIMIT, 3])
def test_zipfile_reads_what_was_written(monkeypatch, limit, count_limit, tmp_path):
    # Lower limits make small archives use zip64's fields.
    monkeypatch.setattr(wheel_zip, "LIMIT", limit)
    monkeypatch.setattr(wheel_zip, "COUNT_LIMIT", count_limit)
    with (tmp_path / "x.zip").open("w+b") as out:
        writer = ZipWriter(out)
        with archive(MEMBERS) as source:
            for info in source.infolist():
                writer.copy(source, info)
        writer.store("new/ü", b"stored" * 1000, DATE, 0o100755)
        writer.close()
    with zipfile.ZipFile(tmp_path / "x.zip") as made:
        assert made.testzip() is None
        assert {n: made.read(n) for n in made.namelist()} == MEMBERS | {"new/ü": b"stored" * 1000}
        assert made.getinfo("new/ü").external_attr >> 16 == 0o100755
        assert made.getinfo("a").external_attr >> 16 == 0o100640
        assert all(info.date_time == DATE for info in made.infolist())
    unzip = shutil.which("unzip")
    if unzip:
        done = subprocess.run([unzip, "-t", str(tmp_path / "x.zip")], capture_output=True)
        assert done.returncode == 0, done.stdout


def test_a_member_of_more_than_four_gib_is_announced_in_zip64(tmp_path):
    class Sparse(io.RawIOBase):
        """Counts what is written and keeps small writes alone."""

        def __init__(self):
            self.at, self.kept = 0, {}

        def write(self, data):
            if len(data) < 1 << 16:
                self.kept[self.at] = bytes(data)
            self.at += len(data)
            return len(data)

        def tell(self):
            return self.at

    class Huge(bytes):
        def __len__(self):
            return size

    size = 5 << 30
    out = Sparse()
    writer = ZipWriter(out)
    # crc32 of the stand-in does not matter here: the headers are what is read.
    writer._header("huge", zipfile.ZIP_STORED, DATE, 0, size, size, 0o100644)
    out.at += size
    writer.store("after", b"x", DATE, 0o100644)
    writer.close()
    path = tmp_path / "sparse.zip"
    with path.open("wb") as file:
        for at, data in out.kept.items():
            file.seek(at)
            file.write(data)
    with zipfile.ZipFile(path) as made:
        huge, after = made.infolist()
        assert (huge.file_size, huge.compress_size) == (size, size)
        assert after.header_offset > size and made.read("after") == b"x"


def test_a_member_written_with_a_data_descriptor_is_copied(tmp_path):
    class Stream(io.RawIOBase):
        """A file that cannot seek makes zipfile put the sizes after the data."""

        def __init__(self):
            self.data = bytearray()

        def writable(self):
            return True

        def write(self, data):
            self.data += data
            return len(data)

    stream = Stream()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a", b"a" * 1000)
    with zipfile.ZipFile(io.BytesIO(bytes(stream.data))) as source:
        info = source.getinfo("a")
        assert info.flag_bits & wheel_zip.DATA_DESCRIPTOR
        out = io.BytesIO()
        writer = ZipWriter(out)
        writer.copy(source, info)
        writer.close()
    with zipfile.ZipFile(out) as copied:
        assert copied.read("a") == b"a" * 1000
        assert not copied.getinfo("a").flag_bits & wheel_zip.DATA_DESCRIPTOR


@pytest.mark.parametrize(
    ("at", "message"),
    [(0, "no local header"), (8, "differs between"), (14, "differs between"), (30, "is called")],
)
def test_a_local_header_that_lies_is_found(at, message):
    file = io.BytesIO()
    with archive({"a": b"a" * 100}, file=file):
        pass
    data = bytearray(file.getvalue())
    data[at] ^= 1
    with (
        zipfile.ZipFile(io.BytesIO(bytes(data))) as source,
        pytest.raises(StackError, match=message),
    ):
        ZipWriter(io.BytesIO()).copy(source, source.getinfo("a"))


def test_a_name_twice_is_refused():
    writer = ZipWriter(io.BytesIO())
    writer.store("a", b"", DATE, 0o100644)
    with pytest.raises(StackError, match="a would be twice"):
        writer.store("a", b"", DATE, 0o100644)
