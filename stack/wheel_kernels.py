"""Our own package, ``kernels/vllm_sm12x``, as it goes into the wheel."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from stack.errors import StackError

PACKAGE = "vllm_sm12x"
SUFFIXES = frozenset([".py", ".pyi", ".json", ".toml", ".typed", ".md", ".txt"])


def read_kernels(folder: Path) -> dict[str, bytes]:
    """Every file of the package by its path in the wheel (``vllm_sm12x/…``), sorted.

    Args:
        folder: The folder that holds the package (``kernels/``).

    Compiled Python and hidden files are passed over. Anything else that is not known to belong is
    an error: an editor's left-over in a wheel cannot be taken back.

    Raises:
        StackError: The package is missing, or holds a link or a file of an unknown kind.
    """
    package = folder / PACKAGE
    if not (package / "__init__.py").is_file():
        raise StackError(f"{package} is no Python package", "run from a complete checkout")
    files: dict[str, bytes] = {}
    for path in sorted(package.rglob("*")):
        inner = path.relative_to(package)
        if any(part == "__pycache__" or part.startswith(".") for part in inner.parts):
            continue
        if path.is_symlink():
            raise StackError(f"{path} is a symbolic link, which a wheel cannot hold", "use a file")
        if path.is_dir() or path.suffix == ".pyc":
            continue
        if path.suffix not in SUFFIXES:
            raise StackError(
                f"{path} is of no kind that goes into the wheel ({' '.join(sorted(SUFFIXES))})",
                "remove it, or add its kind to stack/wheel_kernels.py",
            )
        files[f"{PACKAGE}/{inner.as_posix()}"] = path.read_bytes()
    return dict(sorted(files.items()))


def tree_digest(files: Mapping[str, bytes]) -> str:
    """One SHA-256 over all files: of what ``sha256sum`` prints for them, sorted by path."""
    lines = (f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in files.items())
    return hashlib.sha256("".join(sorted(lines, key=lambda line: line[66:])).encode()).hexdigest()
