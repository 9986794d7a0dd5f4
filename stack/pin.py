"""``upstream.toml``: the pinned release, its digests, and the hashes of its tree."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stack.errors import StackError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10 alone
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PIN_FILE = ROOT / "upstream.toml"
ARCHITECTURES = ("x86_64", "aarch64")


@dataclass(frozen=True)
class Artifact:
    """A file on the package index: its name, size in bytes and SHA-256 (64 hex digits)."""

    filename: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Pin:
    """What ``upstream.toml`` says. ``wheels`` maps an architecture to upstream's binary wheel."""

    project: str
    version: str
    commit: str
    repository: str
    torch: str
    triton: str
    cuda: str
    requires_python: str
    exclude_newer: str
    build_number: int
    sdist: Artifact
    wheels: dict[str, Artifact]
    base_tree: str
    patched_tree: str

    @property
    def local_version(self) -> str:
        """The version of the wheel we make, ``0.22.1+sm12x.1``."""
        return f"{self.version}+sm12x.{self.build_number}"


def _get(table: dict[str, Any], dotted: str, kind: type, path: Path) -> Any:
    value: Any = table
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            raise StackError(f"{path.name}: {dotted} is missing", f"add it to {path}")
        value = value[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise StackError(
            f"{path.name}: {dotted} is {value!r}, expected {kind.__name__}", f"mend it in {path}"
        )
    return value


def _matching(value: str, pattern: str, dotted: str, what: str, path: Path) -> str:
    if not re.fullmatch(pattern, value):
        raise StackError(
            f"{path.name}: {dotted} is {value!r}, expected {what}", f"mend it in {path}"
        )
    return value


def _artifact(table: dict[str, Any], dotted: str, path: Path) -> Artifact:
    return Artifact(
        filename=_matching(
            _get(table, f"{dotted}.filename", str, path),
            r"[A-Za-z0-9][A-Za-z0-9._+-]*",
            f"{dotted}.filename",
            "a file name without a folder",
            path,
        ),
        size=_get(table, f"{dotted}.size", int, path),
        sha256=_matching(
            _get(table, f"{dotted}.sha256", str, path),
            r"[0-9a-f]{64}",
            f"{dotted}.sha256",
            "64 hex digits",
            path,
        ),
    )


def load_pin(path: Path = PIN_FILE) -> Pin:
    """Read and validate ``upstream.toml``.

    Raises:
        StackError: The file is missing, is not TOML, or a key is missing or malformed; the message
            names the file and the key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StackError(f"{path} does not exist", "run from a complete checkout") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StackError(f"{path.name} is not valid TOML: {error}", f"mend {path}") from None

    def text(dotted: str) -> str:
        return _get(table, dotted, str, path)

    return Pin(
        project=text("release.project"),
        version=_matching(
            text("release.version"),
            r"\d+(\.\d+)+",
            "release.version",
            "a release such as 0.22.1",
            path,
        ),
        commit=_matching(
            text("release.commit"), r"[0-9a-f]{40}", "release.commit", "40 hex digits", path
        ),
        repository=text("release.repository"),
        torch=text("release.torch"),
        triton=text("release.triton"),
        cuda=text("release.cuda"),
        requires_python=text("release.requires-python"),
        exclude_newer=text("release.exclude-newer"),
        build_number=_get(table, "build.number", int, path),
        sdist=_artifact(table, "sdist", path),
        wheels={arch: _artifact(table, f"wheel.{arch}", path) for arch in ARCHITECTURES},
        base_tree=_matching(
            text("tree.base"), r"[0-9a-f]{40}|", "tree.base", "40 hex digits", path
        ),
        patched_tree=_matching(
            text("tree.patched"), r"[0-9a-f]{40}|", "tree.patched", "40 hex digits", path
        ),
    )
