"""Every changed path is in the wheel, known to be no part of one, or refused."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from stack import download, wheel_changes
from stack.errors import StackError
from stack.git import git
from stack.importing import ImportedSeries
from stack.pin import load_pin
from stack.wheel_changes import Change, read_changes, sort_out, why_refused


def change(path: str, old: bytes | None = b"old", new: bytes | None = b"new") -> Change:
    return Change(path, old, new, patches=("core/one.patch",))


@pytest.mark.parametrize(
    "path",
    [
        "vllm/envs.py",
        "vllm/model_executor/layers/fused_moe/configs/x.json",
        "vllm/py.typed",
        "vllm/distributed/kv_transfer/kv_connector/v1/hf3fs/utils/hf3fs_utils.cpp",
        "vllm/csrc/like.py",
    ],
)
def test_what_goes_into_the_wheel(path):
    for one in (change(path), change(path, new=None)):
        assert sort_out([one]) == ([one], [])


@pytest.mark.parametrize(
    "path",
    [
        "tests/kernels/test_x.py",
        "tests/csrc/x.cu",
        "docs/a.md",
        "examples/a.py",
        "benchmarks/b.py",
        ".github/workflows/x.yml",
        "docker/Dockerfile",
        "tools/profiler.py",
        "requirements/test/cuda.txt",
        "SECURITY.md",
    ],
)
def test_what_no_wheel_contains(path):
    for one in (change(path), change(path, old=None), change(path, new=None)):
        assert sort_out([one]) == ([], [one])


@pytest.mark.parametrize(
    "path",
    [
        "csrc/attention/x.cu",
        "csrc/ops.h",
        "cmake/utils.cmake",
        "CMakeLists.txt",
        "setup.py",
        "setup.cfg",
        "pyproject.toml",
        "MANIFEST.in",
        "rust/src/lib.rs",
        "rust-toolchain.toml",
        "build_rust.sh",
        "requirements/build/cuda.txt",
        "requirements/cuda.txt",
        "requirements/common.txt",
        "tools/build_deepgemm_C.py",
        "vllm/_version.py",
        "vllm/third_party/x/CMakeLists.txt",
        "README.md",
        "LICENSE",
        # Nobody has thought of these yet: better an error than a lost change.
        "newfolder/x.py",
        "new.cfg",
        "requirements/new.txt",
        "testsuite/x.py",
        "tests",
        "vllm.egg-info/SOURCES.txt",
    ],
)
def test_what_a_wheel_from_binaries_cannot_carry(path):
    for one in (change(path), change(path, old=None), change(path, new=None)):
        with pytest.raises(StackError) as error:
            sort_out([change("vllm/a.py"), one])
        assert path in error.value.message and "patches/core/one.patch" in error.value.message
        assert "--source" in error.value.hint


@pytest.mark.parametrize("suffix", [".cu", ".cuh", ".cpp", ".h", ".hpp", ".rs", ".CU", ".so"])
def test_a_new_compiled_source_inside_the_package_is_refused(suffix):
    with pytest.raises(StackError, match="something to compile"):
        sort_out([change(f"vllm/kernels/new{suffix}", old=None)])


def test_compiled_python_is_refused():
    for path in ("vllm/__pycache__/a.cpython-312.pyc", "vllm/a.pyc"):
        with pytest.raises(StackError, match="compiled Python"):
            sort_out([change(path, old=None)])


def test_all_refused_files_are_counted():
    with pytest.raises(StackError, match=r"csrc/a.cu.* \(and 2 more such files\)"):
        sort_out([change("csrc/a.cu"), change("setup.py"), change("csrc/b.cu")])


@pytest.mark.network
def test_every_file_of_the_pinned_release_is_decided_on():
    """Of the whole release: what lies in upstream's wheel, what the build reads, and the rest."""
    import zipfile

    pin = load_pin()
    with tarfile.open(download.fetch(pin.sdist, project="vllm")) as sdist:
        paths = {m.name.partition("/")[2] for m in sdist if m.isfile()}
    with zipfile.ZipFile(download.fetch(pin.wheels["x86_64"], project="vllm")) as wheel:
        members = set(wheel.namelist())
    generated = {"PKG-INFO", "setup.cfg", "vllm/_version.py"}
    undecided, inside, lost = [], set(), []
    for path in sorted(paths - generated):
        if path.startswith("vllm.egg-info/"):
            continue
        why = why_refused(change(path))
        if why is None and path.startswith("vllm/"):
            inside.add(path)
        if why is not None and "not known" in why:
            undecided.append(path)
        if why is not None and path in members:
            lost.append(path)
    assert undecided == [] and lost == []
    assert inside <= members, "a change to each of these reaches the wheel"
    assert len(inside) > 2000


@pytest.fixture
def repo(tmp_path) -> Path:
    folder = tmp_path / "tree"
    folder.mkdir()
    git("init", "-q", cwd=folder)
    return folder


def commit(repo: Path, files: dict[str, bytes | None]) -> str:
    for name, data in files.items():
        path = repo / name
        if data is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    git("add", "-A", cwd=repo)
    git("commit", "-q", "-m", "x", cwd=repo)
    return git("rev-parse", "HEAD", cwd=repo).text


def test_changes_are_read_from_git(repo):
    body = b"".join(b"line %d\n" % i for i in range(50))
    start = {"vllm/a.py": body, "vllm/b.py": b"b\xff\r\n", "vllm/c d.py": b"c", "vllm/s.sh": b""}
    base = commit(repo, start)
    first = commit(repo, {"vllm/a.py": None, "vllm/ä.py": body, "vllm/b.py": b"b\xfe\r\n"})
    os.chmod(repo / "vllm/s.sh", 0o755)
    second = commit(repo, {"vllm/b.py": b"\0", "vllm/t.py": b"t", "vllm/c d.py": b"d"})
    third = commit(repo, {"vllm/t.py": None, "vllm/c d.py": b"c"})
    names = ("core/1.patch", "core/2.patch", "extra/3.patch")
    imported = ImportedSeries(repo, base, third, names, (first, second, third))
    assert read_changes(imported) == [
        Change("vllm/a.py", body, None, patches=names[:1]),
        Change("vllm/b.py", b"b\xff\r\n", b"\0", patches=names[:2]),
        Change("vllm/s.sh", b"", b"", executable=True, patches=names[1:2]),
        # No renames: what moved is one file gone and one file new.
        Change("vllm/ä.py", None, body, patches=names[:1]),
    ]


def test_an_empty_series_changes_nothing(repo):
    base = commit(repo, {"vllm/a.py": b""})
    assert read_changes(ImportedSeries(repo, base, base, (), ())) == []


def test_a_symbolic_link_is_refused(repo):
    base = commit(repo, {"vllm/a.py": b""})
    os.symlink("a.py", repo / "vllm/link.py")
    head = commit(repo, {})
    with pytest.raises(StackError, match="vllm/link.py a symbolic link") as error:
        read_changes(ImportedSeries(repo, base, head, ("core/l.patch",), (head,)))
    assert "patches/core/l.patch" in error.value.message


def test_the_two_lists_do_not_overlap_by_accident():
    for entry in wheel_changes.COMPILED:
        within = [other for other in wheel_changes.NOT_IN_A_WHEEL if entry.startswith(other)]
        # tools/ is the one folder of which a part is compiled.
        assert within in ([], ["tools/"])
