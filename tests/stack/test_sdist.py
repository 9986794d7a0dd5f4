"""Reading an sdist: what is kept, what is left out, and what is refused."""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile

import pytest

from stack import sdist
from stack.errors import StackError
from stack.sdist import GENERATED, IGNORED


def archive(path, entries):
    """Write (name, type, data, link) entries as they are, sane or not."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, kind, data, link in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size, entry.linkname = kind, len(data), link
            tar.addfile(entry, io.BytesIO(data))
    path.write_bytes(gzip.compress(raw.getvalue()))
    return path


def plain(name, data=b"x"):
    return (name, tarfile.REGTYPE, data, "")


def test_shared_and_excluded_files_of_the_small_upstream(upstream):
    from_git = subprocess.run(
        ["git", "ls-tree", "-r", "-z", "HEAD"],
        cwd=upstream.repository, check=True, capture_output=True, text=True,
    ).stdout.split("\0")[:-1]  # fmt: skip
    tracked = {line.partition("\t")[2]: tuple(line.split()[:3:2]) for line in from_git}
    differing = {".gitattributes", "ci.yml", "linked", "vllm/kept.log"}
    expected = {path: entry for path, entry in tracked.items() if path not in differing}

    found = sdist.contents(upstream.archive)
    assert {path: (file.mode, file.blob) for path, file in found.files.items()} == expected
    assert list(found.files) == sorted(found.files)
    setuptools, setuptools_scm = GENERATED.values()
    assert found.excluded == {
        "PKG-INFO": setuptools,
        "build/left.txt": IGNORED,
        "setup.cfg": setuptools,
        "vllm.egg-info/PKG-INFO": setuptools,
        "vllm.egg-info/SOURCES.txt": setuptools,
        "vllm/_version.py": setuptools_scm,
        "vllm/kept.log": IGNORED,
    }


def test_nested_ignore_files_and_negations_are_gits(tmp_path):
    path = archive(
        tmp_path / "a.tar.gz",
        [
            plain("top/.gitignore", b"*.tmp\n!keep.tmp\n"),
            plain("top/a.tmp"),
            plain("top/keep.tmp"),
            plain("top/sub/.gitignore", b"/local\n"),
            plain("top/sub/local"),
            plain("top/local"),
        ],
    )
    assert sorted(sdist.contents(path).excluded) == ["a.tmp", "sub/local"]


@pytest.mark.parametrize("data", [b"", b"hello\n", bytes(range(256))])
def test_blob_id_is_gits(tmp_path, data):
    got = subprocess.run(
        ["git", "hash-object", "--stdin"], input=data, cwd=tmp_path, check=True, capture_output=True
    )
    assert sdist.blob_id(data) == got.stdout.decode().strip()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(0o664, "100644"), (0o775, "100755"), (0o600, "100644"), (0o744, "100755"), (0o611, "100644")],
)
def test_only_the_owners_execute_bit_counts(tmp_path, mode, expected):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        entry = tarfile.TarInfo("top/file")
        entry.mode = mode
        tar.addfile(entry)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(raw.getvalue()))
    assert [item[:2] for item in sdist.read(tmp_path / "a.tar.gz")] == [("file", expected)]


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([plain("/etc/passwd")], "unsafe path '/etc/passwd'"),
        ([plain("top/../../escape")], "unsafe path"),
        ([plain("top/.git/config")], "unsafe path"),
        ([plain("top//double")], "unsafe path"),
        ([plain("top/two\nlines")], "unsafe path"),
        ([plain("top/a"), plain("other/b")], "more than one top folder: other, top"),
        ([plain("top/a"), plain("top/a")], "a comes twice"),
        ([plain("loose")], "loose is not a plain file"),
        ([("top/link", tarfile.SYMTYPE, b"", "/etc/passwd")], "top/link is not a plain file"),
        ([("top/hard", tarfile.LNKTYPE, b"", "top/a")], "top/hard is not a plain file"),
        ([("top/pipe", tarfile.FIFOTYPE, b"", "")], "top/pipe is not a plain file"),
    ],
)
def test_what_an_sdist_must_not_hold(tmp_path, entries, text):
    path = archive(tmp_path / "bad.tar.gz", entries)
    with pytest.raises(StackError, match="bad.tar.gz") as caught:
        list(sdist.read(path))
    assert text in caught.value.message


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.9])
def test_a_broken_archive_is_named(tmp_path, upstream, cut):
    data = upstream.archive.read_bytes()
    path = tmp_path / "cut.tar.gz"
    path.write_bytes(data[: int(len(data) * cut)] if cut else b"no archive")
    with pytest.raises(StackError, match="cut.tar.gz: cannot be read") as caught:
        list(sdist.read(path))
    assert "delete" in caught.value.hint
