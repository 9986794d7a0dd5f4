"""The assembled wheel: what is in it, and that its bytes depend on the inputs alone."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

from stack import wheel_assemble
from stack.errors import StackError
from stack.pin import ROOT
from stack.wheel_assemble import assemble
from stack.wheel_changes import Change

VERSION = "1.2.3+sm12x.4"
INFO = f"vllm-{VERSION}.dist-info"
NAME = f"vllm-{VERSION}-cp38-abi3-manylinux_2_28_x86_64.whl"
KERNELS = {"vllm_sm12x/__init__.py": b"", "vllm_sm12x/ops/x.py": b"X = 1\n"}


def build(source: Path, out: Path, changes=(), kernels=KERNELS, **other):
    told = {
        "old_version": "1.2.3",
        "version": VERSION,
        "note": "> a note",
        "changes": changes,
        "kernels": kernels,
        "licence": b"our licence\n",
    }
    return assemble(source, out, **(told | other))


@pytest.fixture
def source(make_wheel, upstream_files) -> Path:
    return make_wheel(upstream_files)


def old(files, path: str) -> bytes:
    return files[path][0]


@pytest.fixture
def changes(upstream_files) -> list[Change]:
    a, b, run = (old(upstream_files, f"vllm/{name}") for name in ("a.py", "b.py", "run.sh"))
    return [
        Change("vllm/a.py", a, a + b"A = 2\n"),
        Change("vllm/b.py", b, None),
        Change("vllm/new/c.py", None, b"C = 1\n"),
        Change("vllm/new/go.sh", None, b"#!/bin/sh\n", executable=True),
        Change("vllm/run.sh", run, run, executable=False),
    ]


def test_the_content_is_upstreams_with_the_changes(source, tmp_path, upstream_files, changes):
    made = build(source, tmp_path / "dist", changes)
    assert made.path == tmp_path / "dist" / NAME
    expected = {k: v[0] for k, v in upstream_files.items() if k.startswith("vllm/")}
    expected["vllm/a.py"] += b"A = 2\n"
    del expected["vllm/b.py"]
    expected |= {"vllm/new/c.py": b"C = 1\n", "vllm/new/go.sh": b"#!/bin/sh\n"} | KERNELS
    with zipfile.ZipFile(made.path) as wheel:
        assert wheel.testzip() is None
        names = wheel.namelist()
        found = {name: wheel.read(name) for name in names if not name.startswith(INFO)}
        assert len(names) == len(set(names)) == len(found) + 7
        assert names[-1] == f"{INFO}/RECORD"
        version = found.pop("vllm/_version.py")
        expected.pop("vllm/_version.py")
        assert found == expected
        assert wheel.read(f"{INFO}/licenses/LICENSE") == b"upstream's licence\n"
        assert wheel.read(f"{INFO}/licenses/vllm_sm12x/LICENSE") == b"our licence\n"
        assert (
            wheel.read(f"{INFO}/entry_points.txt")
            == upstream_files["vllm-1.2.3.dist-info/entry_points.txt"][0]
        )
        assert wheel.read(f"{INFO}/top_level.txt") == b"vllm\nvllm_sm12x\n"
        modes = {i.filename: i.external_attr >> 16 for i in wheel.infolist()}
    namespace: dict = {}
    exec(version, namespace)
    assert namespace["__version__"] == namespace["version"] == VERSION
    assert namespace["__version_tuple__"] == namespace["version_tuple"] == (1, 2, 3, "sm12x.4")
    assert namespace["__commit_id__"] == "g0123456789"
    assert modes["vllm/_C.abi3.so"] == 0o100755
    assert modes["vllm/new/go.sh"] == 0o100755
    assert modes["vllm/run.sh"] == modes["vllm/new/c.py"] == modes["vllm/a.py"] == 0o100644
    assert made.replaced == ("vllm/_version.py", "vllm/a.py", "vllm/run.sh")
    assert made.added == (
        *("vllm/new/c.py", "vllm/new/go.sh", "vllm_sm12x/__init__.py", "vllm_sm12x/ops/x.py"),
    )
    assert made.removed == ("vllm/b.py",)
    content = made.path.read_bytes()
    assert made.sha256 == hashlib.sha256(content).hexdigest() and made.size == len(content)


def test_an_empty_series_builds_too(source, tmp_path, upstream_files):
    made = build(source, tmp_path)
    assert made.replaced == ("vllm/_version.py",) and made.removed == ()


def test_unchanged_members_keep_their_compressed_bytes(source, tmp_path, changes):
    made = build(source, tmp_path, changes)
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(made.path) as after:
        infos = {i.filename: i for i in before.infolist()}
        same = [
            i for i in after.infolist() if i.filename in infos and i.filename not in made.replaced
        ]
        assert len(same) == 5
        for info in same:
            other = infos[info.filename]
            assert info.compress_type == zipfile.ZIP_DEFLATED
            assert raw_bytes(made.path, info) == raw_bytes(source, other)
            assert info.date_time == other.date_time == (2026, 6, 4, 21, 44, 30)
            assert info.external_attr == other.external_attr


def raw_bytes(path: Path, info: zipfile.ZipInfo) -> bytes:
    """The compressed bytes, found by the header's own lengths (they differ between archives)."""
    data = path.read_bytes()
    start = info.header_offset
    lengths = [int.from_bytes(data[start + at : start + at + 2], "little") for at in (26, 28)]
    begin = start + 30 + sum(lengths)
    return data[begin : begin + info.compress_size]


def test_record_has_every_file_with_its_digest(source, tmp_path, changes):
    made = build(source, tmp_path, changes)
    with zipfile.ZipFile(made.path) as wheel:
        rows = list(csv.reader(io.StringIO(wheel.read(f"{INFO}/RECORD").decode())))
        assert rows[-1] == [f"{INFO}/RECORD", "", ""]
        assert sorted(row[0] for row in rows) == sorted(wheel.namelist())
    unpacked = subprocess.run(
        [sys.executable, "-m", "wheel", "unpack", "-d", str(tmp_path / "u"), str(made.path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert unpacked.returncode == 0, unpacked.stderr


def test_metadata_differs_in_version_licence_and_note_alone(source, tmp_path, upstream_files):
    made = build(source, tmp_path)
    before = upstream_files["vllm-1.2.3.dist-info/METADATA"][0].decode()
    with zipfile.ZipFile(made.path) as wheel:
        after = wheel.read(f"{INFO}/METADATA").decode()
        parsed = BytesParser().parsebytes(after.encode())
        wheel_file = BytesParser().parsebytes(wheel.read(f"{INFO}/WHEEL"))
    assert parsed["Version"] == VERSION
    assert parsed.get_all("License-File") == ["LICENSE", "vllm_sm12x/LICENSE"]
    assert [line for line in after.split("\n") if line not in before.split("\n")] == [
        f"Version: {VERSION}",
        "License-File: vllm_sm12x/LICENSE",
        "> a note",
    ]
    assert [line for line in before.split("\n") if line not in after.split("\n")] == [
        "Version: 1.2.3"
    ]
    assert "Version: 1.2.3 is also said here." in after.split("\n\n", 1)[1]
    # The file name is what installers go by; upstream's WHEEL says linux_x86_64.
    assert wheel_file.get_all("Tag") == ["cp38-abi3-manylinux_2_28_x86_64"]
    assert "setuptools" not in wheel_file["Generator"]


def test_compressed_tag_sets_are_written_out(make_wheel, upstream_files, tmp_path):
    tag = "cp38.cp39-abi3-manylinux_2_28_x86_64.linux_x86_64"
    made = build(make_wheel(upstream_files, tag), tmp_path)
    with zipfile.ZipFile(made.path) as wheel:
        told = BytesParser().parsebytes(wheel.read(f"{INFO}/WHEEL")).get_all("Tag")
    platforms = ("manylinux_2_28_x86_64", "linux_x86_64")
    assert sorted(told) == sorted(f"{p}-abi3-{x}" for p in ("cp38", "cp39") for x in platforms)


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_installers_take_it(source, tmp_path, changes, installer):
    made = build(source, tmp_path, changes)
    target = tmp_path / "site"
    if installer == "pip":
        command = [sys.executable, "-m", "pip", "install", "--no-index"]
    else:
        pytest.importorskip("uv")
        command = [sys.executable, "-m", "uv", "pip", "install", "--offline"]
    done = subprocess.run(
        [*command, "-q", "--no-deps", "--target", str(target), str(made.path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    program = (
        "import importlib.metadata as m, vllm, vllm.a, vllm_sm12x.ops.x\n"
        "print(vllm.__version__, m.version('vllm'), vllm.a.A, vllm_sm12x.ops.x.X)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split() == [VERSION, VERSION, "2", "1"]
    assert (target / "bin" / "vllm").exists()


PROGRAM = """
import json, os, sys
os.umask(int(sys.argv[5], 8))
sys.path.append(os.environ.get("SITE", ""))
from pathlib import Path
from stack.wheel_assemble import assemble
from stack.wheel_changes import Change
changes = [
    Change(c["path"], *(bytes.fromhex(c[k]) if c[k] is not None else None for k in ("old", "new")))
    for c in json.load(open(sys.argv[3]))
]
kernels = {"vllm_sm12x/__init__.py": b"", "vllm_sm12x/ops/x.py": b"X = 1" * 9999}
if sys.argv[4] == "reversed":
    changes, kernels = changes[::-1], dict(reversed(kernels.items()))
made = assemble(Path(sys.argv[1]), Path(sys.argv[2]), old_version="1.2.3", version="1.2.3+sm12x.4",
    note="n", changes=changes, kernels=kernels, licence=b"l")
print(made.sha256)
"""


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_the_same_inputs_give_the_same_bytes(source, tmp_path, changes, version, other_python):
    told = tmp_path / "changes.json"
    told.write_text(
        json.dumps(
            [
                {"path": c.path, "old": c.old and c.old.hex(), "new": c.new and c.new.hex()}
                for c in changes
            ]
        )
    )

    def run(python, out, order="given", umask="022", **env):
        done = subprocess.run(
            [*python, "-c", PROGRAM, str(source), str(tmp_path / out), str(told), order, umask],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return (tmp_path / out / NAME).read_bytes()

    first = run([sys.executable], "one", PYTHONHASHSEED="1", TZ="UTC", LC_ALL="C.UTF-8")
    second = run(
        other_python(version),
        "two",
        order="reversed",
        umask="077",
        PYTHONHASHSEED="2",
        TZ="Pacific/Kiritimati",
        LC_ALL="C",
        SOURCE_DATE_EPOCH="0",
    )
    assert first == second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Change("vllm/a.py", b"other", b"new", patches=("core/x.patch",)), "differs between"),
        (Change("vllm/z.py", b"old", b"new", patches=("core/x.patch",)), "does not have"),
        (Change("vllm/z.py", b"old", None, patches=("core/x.patch",)), "does not have"),
        (Change("vllm/a.py", None, b"new", patches=("core/x.patch",)), "puts into the wheel"),
    ],
)
def test_a_wheel_of_another_release_is_refused(source, tmp_path, change, message):
    with pytest.raises(StackError, match=message) as error:
        build(source, tmp_path / "dist", [change])
    assert change.path in error.value.message and "core/x.patch" in error.value.message
    assert list((tmp_path / "dist").iterdir()) == []


def test_a_kernel_that_hides_upstreams_file_is_refused(source, tmp_path):
    with pytest.raises(StackError, match="vllm/a.py is in upstream's wheel already"):
        build(source, tmp_path, kernels={"vllm/a.py": b""})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda files: files | {"vllm-1.2.3.dist-info/METADATA": (b"Name: vllm\n\n", 0o100644)},
        lambda files: files | {"vllm/_version.py": (b"__version__ = '1.2.3'\n", 0o100644)},
        lambda files: files | {"other-1.dist-info/METADATA": (b"", 0o100644)},
    ],
)
def test_a_wheel_that_is_not_as_expected_is_refused(make_wheel, upstream_files, tmp_path, spoil):
    with pytest.raises(StackError):
        build(make_wheel(spoil(upstream_files)), tmp_path / "dist")
    assert list((tmp_path / "dist").iterdir()) == []


def test_a_file_that_record_does_not_list_is_refused(source, tmp_path):
    with zipfile.ZipFile(source, "a") as wheel:
        wheel.writestr("vllm/stowaway.py", b"")
    with pytest.raises(StackError, match="stowaway"):
        build(source, tmp_path / "dist")


def test_a_damaged_member_is_found_when_the_wheel_is_read_back(source, tmp_path):
    data = bytearray(source.read_bytes())
    with zipfile.ZipFile(source) as wheel:
        info = wheel.getinfo("vllm/_C.abi3.so")
    data[info.header_offset + 100] ^= 1
    source.write_bytes(data)
    with pytest.raises(StackError, match="Bad CRC|is no wheel"):
        build(source, tmp_path / "dist")
    assert list((tmp_path / "dist").iterdir()) == []


def test_not_a_zip(tmp_path):
    path = tmp_path / "vllm-1.2.3-cp38-abi3-linux_x86_64.whl"
    path.write_bytes(b"<html>")
    with pytest.raises(StackError, match="is no wheel"):
        build(path, tmp_path / "dist")


def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch):
    real = wheel_assemble.ZipWriter.copy

    def full(self, archive, info):
        if len(self.members) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, archive, info)

    monkeypatch.setattr(wheel_assemble.ZipWriter, "copy", full)
    with pytest.raises(StackError, match="no space left") as error:
        build(source, tmp_path / "dist")
    assert "--out" in error.value.hint
    assert list((tmp_path / "dist").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, which wants root")
def test_a_disk_that_is_really_full(source, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(StackError, match="no space left"):
            build(source, folder)
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_an_interrupted_build_keeps_the_old_wheel_and_can_be_run_again(
    source, tmp_path, monkeypatch
):
    first = build(source, tmp_path / "dist")
    before = first.path.read_bytes()

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(wheel_assemble.ZipWriter, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(source, tmp_path / "dist", kernels={"vllm_sm12x/__init__.py": b"new"})
    assert [path.name for path in (tmp_path / "dist").iterdir()] == [NAME]
    assert first.path.read_bytes() == before
    # What a killed build leaves behind does no harm.
    (tmp_path / "dist" / f".{NAME}.part").write_bytes(bytes(10_000_000))
    build(source, tmp_path / "dist")
    assert first.path.read_bytes() == before
    assert [path.name for path in (tmp_path / "dist").iterdir()] == [NAME]


def test_two_builds_at_once_do_not_mix(source, tmp_path):
    part = tmp_path / f".{NAME}.part"
    with part.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StackError, match="another run is writing"):
            build(source, tmp_path)
    assert not (tmp_path / NAME).exists()


def test_an_out_folder_that_is_a_file(source, tmp_path):
    (tmp_path / "dist").write_text("")
    with pytest.raises(StackError, match="dist cannot be written"):
        build(source, tmp_path / "dist")
