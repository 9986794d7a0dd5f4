"""What the series changes, and what each changed path means for a wheel made from binaries.

A path either goes into the wheel, or is known to be no part of one, or is refused: compiled code
and metadata come from upstream's wheel, so a patch to what they are made of would be lost there.
A path that fits none of the three is refused as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from stack.errors import StackError
from stack.git import git

if TYPE_CHECKING:
    from stack.importing import ImportedSeries

PACKAGE = "vllm/"
SOURCE_HINT = "compile everything from the patched tree with `./build.sh --source`"

# Top-level folders and files of the release that no wheel contains and no build step reads.
NOT_IN_A_WHEEL = (
    *(".buildkite/", ".gemini/", ".github/", "benchmarks/", "docker/", "docs/", "examples/"),
    *("scripts/", "tests/", "tools/"),
    *(".clang-format", ".coveragerc", ".dockerignore", ".git-blame-ignore-revs", ".gitignore"),
    *(".markdownlint.yaml", ".pre-commit-config.yaml", ".readthedocs.yaml", ".shellcheckrc"),
    *(".yapfignore", "AGENTS.md", "CLAUDE.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "DCO"),
    *("RELEASE.md", "SECURITY.md", "codecov.yml", "mkdocs.yaml", "use_existing_torch.py"),
    *("requirements/dev.txt", "requirements/docs.in", "requirements/docs.txt"),
    *("requirements/kv_connectors.txt", "requirements/kv_connectors_rocm.txt"),
    *("requirements/lint.txt", "requirements/test/"),
    *("requirements/cpu.txt", "requirements/rocm.txt", "requirements/tpu.txt"),
    "requirements/xpu.txt",
)

# What upstream's binaries were made of, and why a change there cannot reach them.
COMPILED = {
    "csrc/": "it is compiled into upstream's binaries",
    "cmake/": "it says how upstream's binaries are compiled",
    "rust/": "it is compiled into vllm-rs",
    "CMakeLists.txt": "it says how upstream's binaries are compiled",
    "build_rust.sh": "it builds vllm-rs",
    "rust-toolchain.toml": "it says how vllm-rs is compiled",
    "setup.py": "it builds the wheel",
    "setup.cfg": "it configures the wheel's build",
    "pyproject.toml": "it declares the wheel's build and metadata",
    "MANIFEST.in": "it says what the build reads",
    "requirements/build/": "it declares what the wheel is built with",
    "tools/build_deepgemm_C.py": "it compiles the vendored DeepGEMM",
    "tools/install_deepgemm.sh": "it is kept in step with the vendored DeepGEMM",
    "requirements/common.txt": "it declares the wheel's requirements, which stay upstream's",
    "requirements/cuda.txt": "it declares the wheel's requirements, which stay upstream's",
    "README.md": "it is the wheel's description, which stays upstream's",
    "LICENSE": "it is the wheel's licence file, which stays upstream's",
}

# A new file of these kinds below vllm/ would be package data at best, a lost source at worst.
COMPILED_SUFFIXES = frozenset(
    [".c", ".cc", ".cpp", ".cxx", ".cu", ".cuh", ".h", ".hh", ".hpp", ".inl"]
    + [".pyx", ".pxd", ".rs", ".cmake", ".proto", ".so", ".a"]
)


@dataclass(frozen=True)
class Change:
    """One path that the series changes.

    Args:
        path: The path in upstream's tree, with slashes.
        old: The release's content, ``None`` where the series adds the file.
        new: The patched content, ``None`` where the series removes the file.
        executable: Whether the patched file has the executable bit.
        patches: The patches that touch it, as in ``patches/series``.
    """

    path: str
    old: bytes | None
    new: bytes | None
    executable: bool = False
    patches: tuple[str, ...] = ()

    @property
    def who(self) -> str:
        """The patches that touch the path, for a message."""
        names = [f"patches/{name}" for name in self.patches]
        return " and ".join(names) or "the series"


def _listed(path: str, entries: Iterable[str]) -> str | None:
    for entry in entries:
        if path == entry or (entry.endswith("/") and path.startswith(entry)):
            return entry
    return None


def why_refused(change: Change) -> str | None:
    """Why a wheel made from binaries cannot carry the change, or ``None`` where it can.

    A C++ file that upstream ships inside the package (torch compiles it at run time) may be
    edited: it lies in the wheel as it is in the tree. The wheel's assembly checks that it does.
    """
    path = change.path
    compiled = _listed(path, COMPILED)
    if compiled is not None:
        return COMPILED[compiled]
    if path == "vllm/_version.py":
        return "the build writes it"
    if path.startswith(PACKAGE):
        suffix = PurePosixPath(path).suffix.lower()
        if change.old is None and suffix in COMPILED_SUFFIXES:
            return f"a new {suffix} file is something to compile"
        if PurePosixPath(path).name == "CMakeLists.txt":
            return "it says how upstream's binaries are compiled"
        if change.new is not None and ("__pycache__" in path or suffix == ".pyc"):
            return "compiled Python is no part of a wheel"
        return None
    if _listed(path, NOT_IN_A_WHEEL) is not None:
        return None
    return "it is not known whether a wheel contains it (see stack/wheel_changes.py)"


def sort_out(changes: Sequence[Change]) -> tuple[list[Change], list[Change]]:
    """Divide the changes into those that go into the wheel and those that are no part of one.

    Raises:
        StackError: A change can reach the wheel in neither way; names the patch and the file.
    """
    refused = [(change, why) for change in changes if (why := why_refused(change))]
    if refused:
        change, why = refused[0]
        more = f" (and {len(refused) - 1} more such files)" if len(refused) > 1 else ""
        raise StackError(
            f"{change.who} changes {change.path}: {why}, so a wheel made from upstream's binaries "
            f"would not have the change{more}",
            SOURCE_HINT,
        )
    inside = [change for change in changes if change.path.startswith(PACKAGE)]
    return inside, [change for change in changes if not change.path.startswith(PACKAGE)]


def read_changes(imported: ImportedSeries) -> list[Change]:
    """Every path that differs between the release and the end of the series, sorted by path.

    Raises:
        StackError: A patch makes a symbolic link or a submodule, which a wheel cannot hold.
    """
    repo = imported.path
    touched = _patches_by_path(imported)
    fields = git(
        *("diff", "--raw", "-z", "--no-abbrev", "--no-renames", "--ignore-submodules=none"),
        *(imported.base, imported.head),
        cwd=repo,
    ).fields
    changes = []
    for told, path in zip(fields[::2], fields[1::2], strict=True):
        old_mode, mode, old_blob, blob, status = told.removeprefix(":").split(" ")
        patches = touched.get(path, ())
        if status != "D" and mode not in ("100644", "100755"):
            what = {"120000": "a symbolic link", "160000": "a submodule"}.get(mode, f"mode {mode}")
            names = " and ".join(f"patches/{name}" for name in patches)
            raise StackError(
                f"{names} makes {path} {what}, which a wheel cannot hold", "use a file"
            )
        changes.append(
            Change(
                path=path,
                old=None if status == "A" else _blob(repo, old_blob),
                new=None if status == "D" else _blob(repo, blob),
                executable=mode == "100755",
                patches=patches,
            )
        )
    return sorted(changes, key=lambda change: change.path)


def _blob(repo: Path, blob: str) -> bytes:
    return git("cat-file", "blob", blob, cwd=repo).stdout


def _patches_by_path(imported: ImportedSeries) -> dict[str, tuple[str, ...]]:
    touched: dict[str, tuple[str, ...]] = {}
    for name, commit in zip(imported.patches, imported.commits, strict=True):
        paths = git(
            *("diff-tree", "-r", "-z", "--name-only", "--no-commit-id", "--no-renames"),
            *(f"{commit}^", commit),
            cwd=imported.path,
        ).fields
        for path in paths:
            touched[path] = (*touched.get(path, ()), name)
    return touched
