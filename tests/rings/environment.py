"""The environments that the tests run in: made once, reused while what they hold is unchanged.

Three of them, so that no side's packages decide another's: ``.build/check-env`` is the stack tool's
own requirements with pytest and the linters, ``.build/gates-env`` is the validation suite's with
pytest, ``.build/test-env`` is the wheel as a user installs it, with its lock and pytest.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stack import bootstrap
from stack.errors import StackError

ROOT = Path(__file__).resolve().parents[2]
CHECK_ENV = ROOT / ".build" / "check-env"
GATES_ENV = ROOT / ".build" / "gates-env"
TEST_ENV = ROOT / ".build" / "test-env"
TOOL_REQUIREMENTS = ROOT / "stack" / "requirements.txt"
CHECK_REQUIREMENTS = ROOT / "tests" / "requirements-checks.txt"
GATES_REQUIREMENTS = ROOT / "gates" / "requirements.txt"
GATES_TEST_REQUIREMENTS = ROOT / "tests" / "requirements-gates.txt"
TEST_REQUIREMENTS = ROOT / "tests" / "requirements.txt"
OLDEST, NEWEST = (3, 10), (3, 14)
ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
STAMP = "made-of"


@dataclass(frozen=True)
class Interpreter:
    """The Python that the tests run on: its path and ``(major, minor)``."""

    path: str
    version: tuple[int, int]

    @property
    def tag(self) -> str:
        """As the locks spell it: ``py312``."""
        return f"py{self.version[0]}{self.version[1]}"


def running() -> Interpreter:
    """The interpreter that runs this, if upstream's wheel supports it.

    Raises:
        StackError: It is older than 3.10 or newer than 3.14.
    """
    version = sys.version_info[:2]
    if not OLDEST <= version <= NEWEST:
        raise StackError(
            f"Python {version[0]}.{version[1]} is not supported: 3.10 to 3.14 are",
            "name another one: PYTHON=python3.12 ./test.sh",
        )
    # The base interpreter: a virtual environment made from another one would lean on it.
    return Interpreter(getattr(sys, "_base_executable", "") or sys.executable, version)


def architecture() -> str:
    """This machine's architecture as wheels and locks spell it.

    Raises:
        StackError: Upstream has no wheel for it.
    """
    machine = platform.machine().lower()
    if machine not in ARCHITECTURES or sys.platform != "linux":
        raise StackError(
            f"there is no wheel for {sys.platform} on {machine}",
            "run on Linux with x86_64 or aarch64",
        )
    return ARCHITECTURES[machine]


def lock_for(interpreter: Interpreter, arch: str, root: Path = ROOT) -> Path:
    """The lock of an interpreter and architecture; a missing one is never replaced by another's.

    Raises:
        StackError: ``constraints/`` has no such lock.
    """
    lock = root / "constraints" / f"{interpreter.tag}-{arch}.txt"
    if not lock.is_file():
        raise StackError(
            f"constraints/{lock.name} is missing", "make it: python -m stack constraints"
        )
    return lock


def wheel_name(pin_text: str, arch: str) -> str:
    """The file name pattern of the wheel that ``upstream.toml`` and an architecture ask for.

    Read without a TOML parser: this runs before there is one on Python 3.10.
    """
    version = re.search(r'^version = "([^"]+)"$', pin_text, re.M)
    number = re.search(r"^number = (\d+)$", pin_text, re.M)
    if not version or not number:
        raise StackError("upstream.toml has no release.version or build.number", "mend it")
    return f"vllm-{version[1]}+sm12x.{number[1]}-*_{arch}.whl"


def build_wheel(interpreter: Interpreter, arch: str) -> Path:
    """Run ``build.sh`` for this machine and return the wheel it made."""
    _run(
        ["sh", ROOT / "build.sh", "--arch", arch],
        "build.sh made no wheel",
        {"PYTHON": interpreter.path},
    )
    name = wheel_name((ROOT / "upstream.toml").read_text(encoding="utf-8"), arch)
    found = sorted((ROOT / "dist").glob(name))
    if len(found) != 1:
        raise StackError(
            f"dist/ has {len(found)} wheels named {name}, expected one",
            "remove dist/ and run again",
        )
    return found[0]


def make_tools() -> Path:
    """The interpreter of ``.venv``, which ``build.sh`` shares; made where it is not whole."""
    return bootstrap.ensure(ROOT)


def make_check_env(interpreter: Interpreter, uv: Path) -> str:
    """Bring ``.build/check-env`` up to date and return what was done, in a word."""
    return _make_locked(CHECK_ENV, [TOOL_REQUIREMENTS, CHECK_REQUIREMENTS], interpreter, uv)


def make_gates_env(interpreter: Interpreter, uv: Path) -> str:
    """Bring ``.build/gates-env`` up to date and return what was done, in a word."""
    return _make_locked(GATES_ENV, [GATES_REQUIREMENTS, GATES_TEST_REQUIREMENTS], interpreter, uv)


def _make_locked(
    folder: Path, requirements: Sequence[Path], interpreter: Interpreter, uv: Path
) -> str:
    """An environment of files that pin every package by digest."""
    wanted = digest(requirements, *_identity(interpreter)) + "\n"
    if _stamp(folder) == wanted:
        return "unchanged"
    _fresh(folder, interpreter, uv)
    files = [part for path in requirements for part in ("--requirement", path)]
    _install(uv, folder, f"{folder.name} was not installed", "--require-hashes", *files)
    (folder / STAMP).write_text(wanted)
    return "made"


def make_test_env(interpreter: Interpreter, uv: Path, lock: Path, wheel: Path) -> str:
    """Bring ``.build/test-env`` up to date and return what was done, in a few words.

    The environment is made anew when the interpreter, the lock or a requirement changed; the wheel
    alone is replaced when only the wheel did. The stamp is written last, so that an interrupted
    run leaves none.
    """
    base = digest([lock, TEST_REQUIREMENTS], *_identity(interpreter))
    wanted = f"{base}\n{digest([wheel])}\n"
    have = _stamp(TEST_ENV)
    if have == wanted:
        return "unchanged"
    failure = "the wheel was not installed"
    if have.startswith(base):
        (TEST_ENV / STAMP).unlink()
        _install(uv, TEST_ENV, failure, "--no-deps", "--reinstall-package", "vllm", wheel)
        done = "wheel replaced"
    else:
        _fresh(TEST_ENV, interpreter, uv)
        _install(
            *(uv, TEST_ENV, failure, "--constraint", lock),
            *("--requirement", TEST_REQUIREMENTS, wheel),
        )
        done = "made"
    _run(
        [uv, "pip", "check", "--quiet", "--python", TEST_ENV / "bin" / "python"],
        "the packages of the wheel and its lock contradict each other",
    )
    (TEST_ENV / STAMP).write_text(wanted)
    return done


def digest(paths: Sequence[Path], *words: str) -> str:
    """One SHA-256 over words and the contents of files."""
    total = hashlib.sha256()
    for word in words:
        total.update(word.encode() + b"\0")
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
        total.update(b"\0")
    return total.hexdigest()


def _identity(interpreter: Interpreter) -> tuple[str, str, str]:
    """What a virtual environment hangs on besides its packages; it cannot be moved either."""
    return interpreter.path, str(interpreter.version), str(ROOT)


def _stamp(folder: Path) -> str:
    path = folder / STAMP
    return path.read_text() if path.is_file() else ""


def _fresh(folder: Path, interpreter: Interpreter, uv: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    _run(
        [uv, "venv", "--quiet", "--no-project", "--python", interpreter.path, folder],
        f"{folder.relative_to(ROOT)} was not made",
    )


def _install(uv: Path, folder: Path, failure: str, *arguments: str | Path) -> None:
    python = folder / "bin" / "python"
    # Compiled once here: the parts start some eighty processes that write no bytecode themselves,
    # and to compile vLLM's imports takes longer than to run them.
    command = [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python]
    _run([*command, *arguments], failure)


def _run(
    command: Sequence[str | os.PathLike[str]], failure: str, env: Mapping[str, str] | None = None
) -> None:
    """Run a command with its output shown; its failure is a ``StackError`` that says which."""
    done = subprocess.run(
        [os.fspath(part) for part in command],
        cwd=ROOT,
        env=dict(os.environ) | dict(env or {}),
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise StackError(f"{failure} (exit status {done.returncode})", "the lines above say why")
