"""``map.toml``: which of upstream's test files belong to which file that the series touches."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stack.errors import StackError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10 alone
    import tomli as tomllib

MAP = Path(__file__).with_name("map.toml")
_KEYS = {"cpu", "gpu", "names", "no-cpu-test"}


@dataclass(frozen=True)
class Entry:
    """The tests of one touched file.

    ``cpu`` are run, ``gpu`` are those that do nothing without a GPU (the baseline shows it), and
    ``no_cpu_test`` says what was searched for where ``cpu`` is empty. ``names`` narrows the search
    for a module that half of vLLM imports: a test belongs to it when it uses one of them.
    """

    cpu: tuple[str, ...]
    gpu: tuple[str, ...]
    names: tuple[str, ...]
    no_cpu_test: str


@dataclass(frozen=True)
class Map:
    """``always``: test files run whatever the series touches; ``entries``: by upstream file."""

    always: tuple[str, ...]
    entries: Mapping[str, Entry]

    @property
    def cpu(self) -> list[str]:
        """Every test file that ring 0 runs."""
        files = set(self.always)
        for entry in self.entries.values():
            files.update(entry.cpu)
        return sorted(files)

    @property
    def gpu(self) -> list[str]:
        """Every test file that is left to a machine with a GPU."""
        return sorted({file for entry in self.entries.values() for file in entry.gpu})


def load(path: Path = MAP) -> Map:
    """Read and validate the map.

    Raises:
        StackError: It is not TOML, has a key that means nothing, or an entry that says neither
            which tests run nor why there are none; the message names the entry.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise StackError(f"{path.name} is not valid TOML: {error}", f"mend {path}") from None
    always = _strings(table.pop("always", {}).get("tests", []), "always", path)
    entries = {}
    for name, fields in table.items():
        if unknown := sorted(fields.keys() - _KEYS):
            raise StackError(
                f'{path.name}: ["{name}"] has {", ".join(unknown)}',
                f"allowed are {', '.join(sorted(_KEYS))}",
            )
        entry = Entry(
            cpu=_strings(fields.get("cpu", []), name, path),
            gpu=_strings(fields.get("gpu", []), name, path),
            names=_strings(fields.get("names", []), name, path),
            no_cpu_test=fields.get("no-cpu-test", ""),
        )
        if bool(entry.cpu) == bool(entry.no_cpu_test):
            raise StackError(
                f'{path.name}: ["{name}"] must have cpu tests, or else no-cpu-test with the search '
                "that found none",
                f"mend {path}",
            )
        entries[name] = entry
    return Map(always, entries)


def _strings(value: object, name: str, path: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise StackError(f'{path.name}: ["{name}"] holds {value!r}, expected a list of paths')
    return tuple(value)


def touched(patches: Path) -> dict[str, list[str]]:
    """Upstream's files that the series changes, each with the patches that do.

    Files that a patch adds are left out: upstream has no test of them. So are upstream's own tests,
    to which patches add some (see ``added.py``).

    Args:
        patches: The folder that holds ``series``.
    """
    files: dict[str, list[str]] = {}
    for line in (patches / "series").read_text(encoding="utf-8").splitlines():
        name = line.partition("#")[0].strip()
        if not name:
            continue
        text = (patches / name).read_text(encoding="utf-8")
        for match in re.finditer(
            r"^diff --git a/(?P<path>.+) b/(?P=path)\n(?P<head>(?!diff --git )[^\n]*\n)", text, re.M
        ):
            if match["path"].startswith("tests/"):
                continue
            if not match["head"].startswith("new file mode"):
                files.setdefault(match["path"], []).append(name)
    return files


def tests_naming(file: str, folder: Path, names: Sequence[str] = ()) -> list[str]:
    """The release's test files (``test_*.py``) that name a module of upstream.

    Args:
        file: A path such as ``vllm/utils/deep_gemm.py``.
        folder: A folder that holds the release's ``tests/``.
        names: Where given, a test file must use one of these names too.
    """
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parent, _, stem = module.rpartition(".")
    naming = re.compile(
        rf"\b{re.escape(module)}\b"
        rf"|from {re.escape(parent)} import (\([^)]*|[^\n(]*)\b{re.escape(stem)}\b"
    )
    using = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names))
    found = []
    for path in (folder / "tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8", errors="replace")
        if naming.search(text) and using.search(text):
            found.append(path.relative_to(folder).as_posix())
    return sorted(found)
