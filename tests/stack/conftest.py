"""A small upstream: a git repository, the sdist made of it, and a checkout of this project on both.

The repository has what makes sources differ: tracked files that .gitignore matches, a tracked file
that the sdist lacks, generated files that only the sdist has. And what tools like to change: line
ends, modes, empty and binary files, names that need quoting.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from stack import pinfile, sdist, shared, source
from stack.checkout import Checkout
from stack.exporting import export_series
from stack.importing import import_series

VERSION = "1.0.0"

# path -> (git mode, contents): what both sources share.
SHARED = {
    ".gitignore": ("100644", b"*.log\nbuild/\n!/docs/build/\n/vllm/_version.py\n*.egg-info/\n"),
    "README.md": ("100644", b"# Upstream\n"),
    "docs/build/kept.md": ("100644", b"not ignored after all\n"),
    "docs/caf\u00e9 d\u00e9j\u00e0.md": ("100644", "na\u00efve\n".encode()),
    "setup.py": ("100644", b"import setuptools\n"),
    "tests/test_add.py": ("100644", b"def test_add():\n    assert True\n"),
    "tools/run.sh": ("100755", b"#!/bin/sh\nexit 0\n"),
    "vllm/__init__.py": ("100644", b""),
    "vllm/add.py": (
        "100644",
        b"import math\n\n\ndef add(a, b):\n    return a + b\n\n\n"
        + b"".join(b"FILL_%02d = %d\n" % (number, number) for number in range(30))
        + b"def sub(a, b):\n    return a - b\n",
    ),
    "vllm/crlf.py": ("100644", b"A = 1\r\nB = 2\r\nC = 3\r\n"),
    "vllm/data.bin": ("100644", bytes(range(256)) * 3),
    "vllm/no_newline.py": ("100644", b"X = 1\nY = 2"),
    "vllm/table [1,2].json": ("100644", b'{"a": 1}\n'),
}
# Tracked upstream, in the sdist, and matched by upstream's .gitignore.
TRACKED_BUT_IGNORED = {"vllm/kept.log": b"tracked by force\n"}
# Tracked upstream, not in the sdist.
ONLY_IN_GIT = {".gitattributes": b"ci.yml export-ignore\n", "ci.yml": b"on: push\n"}
# In the sdist alone.
GENERATED = {
    "PKG-INFO": b"Name: vllm\n",
    "setup.cfg": b"[egg_info]\n",
    "vllm.egg-info/PKG-INFO": b"Name: vllm\n",
    "vllm.egg-info/SOURCES.txt": b"setup.py\n",
    "vllm/_version.py": b"__version__ = '1.0.0'\n",
    "build/left.txt": b"left over\n",
}
TRAILERS = {
    "Kind": "core",
    "Scope": "add.py; inert elsewhere",
    "Upstream": "none; ours",
    "Drop-when": "upstream adds it",
    "Depends": "none",
    "Tests": "tests/test_add.py",
}
WHY = "Because the test wants it."


def message(subject: str, why: str | None = WHY, **changed: str | None) -> str:
    """A commit message with every trailer; ``Drop_when=None`` leaves one out."""
    trailers = TRAILERS | {key.replace("_", "-"): value for key, value in changed.items()}
    lines = [f"{key}: {value}\n" for key, value in trailers.items() if value is not None]
    return f"{subject}\n\n" + (f"{why}\n\n" if why else "") + "".join(lines)


def plain_git(*args: str, cwd: Path, data: bytes | None = None, **env: str) -> str:
    """Git as a user runs it: with the global configuration that the test has set."""
    done = subprocess.run(
        ["git", *args], cwd=cwd, input=data, env=os.environ | env, check=True, capture_output=True
    )
    return done.stdout.decode().removesuffix("\n")


def write_tar(path: Path, files: dict[str, tuple[int, bytes]], top: str) -> None:
    """A .tar.gz like those of an upstream builder: group-writable, with folders."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        folders = {top}
        for name in files:
            parts = name.split("/")[:-1]
            folders |= {"/".join([top, *parts[: n + 1]]) for n in range(len(parts))}
        for folder in sorted(folders):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o775
            archive.addfile(entry)
        for name, (mode, data) in files.items():
            entry = tarfile.TarInfo(f"{top}/{name}")
            entry.mode, entry.size = mode, len(data)
            archive.addfile(entry, io.BytesIO(data))
    path.write_bytes(gzip.compress(raw.getvalue(), mtime=0))


@dataclass
class Upstream:
    """The repository at one commit, and its sdist."""

    repository: Path
    commit: str
    archive: Path


@dataclass
class Project:
    """A checkout of this project on the small upstream."""

    root: Path
    upstream: Upstream

    @property
    def checkout(self) -> Checkout:
        """A new view of the checkout: it reads ``upstream.toml`` again."""
        return Checkout(self.root)

    @property
    def tree(self) -> Path:
        """The work tree of ``import``."""
        return self.root / ".build" / "vllm"

    @staticmethod
    def message(subject: str, why: str | None = WHY, **changed: str | None) -> str:
        """As the function of that name."""
        return message(subject, why, **changed)

    def git(self, *args: str, **env: str) -> str:
        """Run the user's git in the work tree."""
        return plain_git(*args, cwd=self.tree, **env)

    def commit(self, text: str, files: dict[str, bytes | None], **env: str) -> str:
        """Write (or, with None, delete) files in the work tree and commit all of it."""
        for name, data in files.items():
            path = self.tree / name
            if data is None:
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        self.git("add", "-A", "-f")
        plain_git("commit", "-q", "-F", "-", cwd=self.tree, data=text.encode(), **env)
        return self.git("rev-parse", "HEAD")

    def edited(self, name: str, old: bytes, new: bytes) -> dict[str, bytes | None]:
        """A file of the work tree with one text replaced, for ``commit``."""
        data = (self.tree / name).read_bytes()
        assert data.count(old) == 1, (name, old)
        return {name: data.replace(old, new)}

    def patch(self, name: str) -> Path:
        """The path of a patch file."""
        return self.root / "patches" / name

    def patches(self) -> dict[str, bytes]:
        """Every file below ``patches/`` by name."""
        folder = self.root / "patches"
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def use_submodule(self) -> None:
        """Check the submodule out as a user does."""
        plain_git("init", "-q", cwd=self.root)
        (self.root / "vllm").rmdir()
        plain_git(
            *("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", "--force"),
            *(str(self.upstream.repository), "vllm"),
            cwd=self.root,
        )


def _set_user(home: Path, cache: Path, patch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.startswith("GIT_"):
            patch.delenv(name)
    home.mkdir()
    config = home / ".gitconfig"
    config.write_text("[user]\n\tname = A User\n\temail = user@example.org\n", encoding="utf-8")
    patch.setenv("HOME", str(home))
    patch.delenv("XDG_CONFIG_HOME", raising=False)
    patch.setenv("SM12X_CACHE", str(cache))
    return config


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A user with a home, a git configuration and an empty download cache of their own."""
    return _set_user(tmp_path / "home", tmp_path / "cache", monkeypatch)


def _make_upstream(folder: Path) -> Upstream:
    repository = folder / "upstream"
    repository.mkdir()
    plain_git("init", "-q", "-b", "main", cwd=repository)
    tracked = {name: data for name, (_, data) in SHARED.items()}
    for name, data in {**tracked, **TRACKED_BUT_IGNORED, **ONLY_IN_GIT}.items():
        path = repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755 if SHARED.get(name, ("",))[0] == "100755" else 0o644)
    # A link to a folder: git tracks the link, the packaging leaves it out.
    (repository / "linked").symlink_to("docs")
    plain_git("add", "-A", "-f", cwd=repository)
    plain_git("commit", "-q", "-m", "Release 1.0.0", cwd=repository)
    archive = folder / "cache" / f"vllm-{VERSION}.tar.gz"
    archive.parent.mkdir()
    files = {
        name: (0o775 if mode == "100755" else 0o664, data) for name, (mode, data) in SHARED.items()
    }
    added = {**TRACKED_BUT_IGNORED, **GENERATED}
    write_tar(archive, files | {n: (0o644, d) for n, d in added.items()}, f"vllm-{VERSION}")
    return Upstream(repository, plain_git("rev-parse", "HEAD", cwd=repository), archive)


def _make_project(root: Path, upstream: Upstream) -> Project:
    for folder in ("patches/core", "patches/extra", "vllm"):
        (root / folder).mkdir(parents=True)
    (root / "patches" / "series").write_text("", encoding="utf-8")
    data = upstream.archive.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    wheels = "".join(
        f'[wheel.{arch}]\nfilename = "w-{arch}.whl"\nsize = 1\nsha256 = "{"0" * 64}"\n'
        for arch in ("x86_64", "aarch64")
    )
    (root / "upstream.toml").write_text(
        f'[release]\nproject = "vllm"\nversion = "{VERSION}"\ncommit = "{upstream.commit}"\n'
        'repository = "file:///nowhere"\ntorch = "0"\ntriton = "0"\ncuda = "0"\n'
        'requires-python = ">=3.10"\nexclude-newer = "2026-01-01"\n[build]\nnumber = 1\n'
        f'[sdist]\nfilename = "{upstream.archive.name}"\nsize = {len(data)}\nsha256 = "{digest}"\n'
        f'{wheels}# A comment that must stay.\n[tree]\nbase = ""  # as released\npatched = ""\n',
        encoding="utf-8",
    )
    listed = Checkout(root).shared_files
    shared.write(listed, shared.render(sdist.contents(upstream.archive), VERSION))
    return Project(root, upstream)


def _add_series(project: Project) -> None:
    """Two exported patches, the second one extra, and the trees in the pin."""
    made = import_series(checkout=project.checkout)
    base = source.tree_of(made.path, made.base)
    pinfile.set_values(project.root / "upstream.toml", {"tree.base": base})
    add, sub = b"add(a, b):\n    return a + b", b"    return a - b"
    project.commit(
        message("Add three numbers"),
        project.edited("vllm/add.py", add, b"add(a, b, c=0):\n    return a + b + c"),
    )
    project.commit(
        message("Subtract twice", Kind="tune"), project.edited("vllm/add.py", sub, sub + b" - b")
    )
    export_series(checkout=project.checkout, extra=["Subtract-twice"])


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """The upstream, and the project without and with a series, made once and then copied."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        _set_user(folder / "home", folder / "cache", patch)
        upstream = _make_upstream(folder)
        bare = _make_project(folder / "bare", upstream)
        shutil.copytree(bare.root, folder / "series")
        _add_series(Project(folder / "series", upstream))
        shutil.rmtree(folder / "cache" / "trees")
    return folder, upstream


@pytest.fixture
def upstream(templates, tmp_path, user) -> Upstream:
    """The small upstream, with its sdist in this test's cache."""
    made = templates[1]
    archive = tmp_path / "cache" / made.archive.name
    archive.parent.mkdir()
    shutil.copy2(made.archive, archive)
    return Upstream(made.repository, made.commit, archive)


@pytest.fixture
def project(templates, tmp_path, upstream) -> Project:
    """A checkout with an empty series; the submodule is not checked out."""
    shutil.copytree(templates[0] / "bare", tmp_path / "project")
    return Project(tmp_path / "project", upstream)


@pytest.fixture
def series(templates, tmp_path, upstream) -> Project:
    """The checkout with two exported patches, one of them extra, and a work tree of them."""
    shutil.copytree(templates[0] / "series", tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project", upstream)


@pytest.fixture
def remove_cache(tmp_path):
    """Forget the releases' commits, and keep the sdists."""

    def remove() -> None:
        shutil.rmtree(tmp_path / "cache" / "trees", ignore_errors=True)

    return remove
