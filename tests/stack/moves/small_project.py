"""A small project: releases as sdists made on the spot, and a series on one of them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from stack import download, exporting, sdist, shared
from stack.checkout import Checkout
from stack.git import git
from stack.pin import ROOT
from stack.source import base_commit

OLD, NEW = "1.0.0", "1.1.0"
TRAILERS = """
Kind: core
Scope: a test
Upstream: none; it is a test
Drop-when: the test is over
Depends: {depends}
Tests: tests/test_it.py
"""


def text(*changes: tuple[int, str], count: int = 40, word: str = "line") -> str:
    """``count`` numbered lines; each change replaces line ``number`` (from 1) by other text."""
    lines = [f"{word} {number}\n" for number in range(1, count + 1)]
    for number, new in changes:
        lines[number - 1] = new
    return "".join(lines)


@dataclasses.dataclass
class Project:
    """The project's folder, its releases' sdists by version, and the series as commits."""

    root: Path
    sdists: dict[str, Path]
    commits: Path
    names: list[str]

    @property
    def checkout(self) -> Checkout:
        """A fresh view of the folder."""
        return Checkout(self.root)

    @property
    def work(self) -> Path:
        """Where the tests rebase."""
        return self.root / ".build" / "rebase"

    def release(self, version: str, files: Mapping[str, str | bytes]) -> Path:
        """Make a release's sdist, in the download cache as though it had been fetched."""
        path = download.cache_dir() / f"vllm-{version}.tar.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        told = f"__commit_id__ = commit_id = 'g{version.replace('.', '').ljust(9, 'a')}'\n"
        with tarfile.open(path, "w:gz") as archive:
            for name, data in {**files, "vllm/_version.py": told, "PKG-INFO": "x\n"}.items():
                data = data.encode() if isinstance(data, str) else data
                info = tarfile.TarInfo(f"vllm-{version}/{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        self.sdists[version] = path
        return path

    def pin(self, version: str) -> None:
        """Pin a release that was made before, and list its files."""
        archive = self.sdists[version]
        data = archive.read_bytes()
        toml = (ROOT / "upstream.toml").read_text()
        head, _, rest = toml.partition("[sdist]")
        _, _, wheels = rest.partition("[wheel.x86_64]")
        wheels, _, tree = wheels.partition("[tree]")
        old = Checkout(ROOT).pin
        head = head.replace(f'version = "{old.version}"', f'version = "{version}"')
        tree = tree.replace(old.base_tree or "\0", "").replace(old.patched_tree or "\0", "")
        (self.root / "upstream.toml").write_text(
            f'{head}[sdist]\nfilename = "{archive.name}"\nsize = {len(data)}\n'
            f'sha256 = "{hashlib.sha256(data).hexdigest()}"\n\n[wheel.x86_64]{wheels}[tree]{tree}'
        )
        listing = shared.render(sdist.contents(archive), version)
        shared.write(self.checkout.shared_files, listing)
        git("init", "-q", cwd=self.commits)
        git("reset", "-q", "--hard", base_commit(self.commits, self.checkout), cwd=self.commits)

    def add(
        self,
        subject: str,
        changes: Mapping[str, str | bytes | None],
        *,
        folder: str = "core",
        depends: str = "none",
        body: str = "Because the test wants it.",
    ) -> str:
        """Add a patch that gives files new contents (``None`` deletes); return its name."""
        for name, data in changes.items():
            path = self.commits / name
            if data is None:
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.encode() if isinstance(data, str) else data)
        git("add", "-A", cwd=self.commits)
        message = f"{subject}\n\n{body}\n{TRAILERS.format(depends=depends)}"
        author = {"GIT_AUTHOR_NAME": "Ada Ä", "GIT_AUTHOR_EMAIL": "ada@example.org"}
        author["GIT_AUTHOR_DATE"] = "1767300000 +0100"
        git("commit", "-q", "-F", "-", cwd=self.commits, input=message, env=author)
        patch = exporting.render(self.commits, "HEAD", folder)
        path = self.checkout.patches / patch.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(patch.raw)
        self.names.append(patch.name)
        (self.checkout.patches / "series").write_text("".join(f"{n}\n" for n in self.names))
        return patch.name

    def files(self) -> dict[str, bytes]:
        """Every file of the project outside ``.build/``, by path: to see that none changed."""
        return {
            path.relative_to(self.root).as_posix(): path.read_bytes()
            for path in self.root.rglob("*")
            if path.is_file() and ".build" not in path.parts
        }

    def content(self, name: str, commit: str = "HEAD") -> str:
        """A file of a commit of the work repository."""
        return git("cat-file", "blob", f"{commit}:{name}", cwd=self.work).stdout.decode()

    def resolve(self, changes: Mapping[str, str | None]) -> None:
        """Settle files in the work repository as a person would: edit and ``git add``."""
        for name, data in changes.items():
            if data is None:
                git("rm", "-q", "-f", "--", name, cwd=self.work)
            else:
                (self.work / name).write_text(data)
                git("add", "--", name, cwd=self.work)
