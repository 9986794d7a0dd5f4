"""The locks: what the wheel runs with (``constraints/``), and what the stack tool runs with.

``uv pip compile`` resolves; the pin's date (``exclude-newer``) makes it resolve as of the release's
week, so that the same locks come out on any day. The tool's own requirements have a date of
their own, in the head of ``requirements.txt``, and digests.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from stack import index
from stack.errors import StackError
from stack.pin import ARCHITECTURES, ROOT, Pin

CONSTRAINTS = ROOT / "constraints"
TOOL_INPUT = ROOT / "stack" / "requirements.in"
TOOL_LOCK = ROOT / "stack" / "requirements.txt"
COMMAND = "python -m stack constraints"
# The oldest glibc that upstream's wheels run on (manylinux_2_28).
PLATFORM = "{arch}-manylinux_2_28"


def python_versions(pin: Pin) -> list[str]:
    """``3.10`` to ``3.14``, from ``requires-python = ">=3.10,<3.15"``.

    Raises:
        StackError: The pin's range is not of that form.
    """
    match = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", pin.requires_python)
    if match is None:
        raise StackError(
            f"upstream.toml: requires-python is {pin.requires_python!r}, expected '>=3.A,<3.B'",
            "mend upstream.toml, or teach stack/locks.py the other form",
        )
    return [f"3.{minor}" for minor in range(int(match[1]), int(match[2]))]


def lock_path(version: str, arch: str) -> Path:
    """``constraints/py312-x86_64.txt``."""
    return CONSTRAINTS / f"py{version.replace('.', '')}-{arch}.txt"


def targets(pin: Pin) -> list[tuple[str, str]]:
    """Every Python and architecture that a lock is made for."""
    return [(version, arch) for version in python_versions(pin) for arch in ARCHITECTURES]


def find_uv() -> str:
    """The ``uv`` of this environment, else the one on PATH.

    Raises:
        StackError: There is none.
    """
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise StackError(
            "uv is not installed",
            "run it through ./build.sh's environment: .venv/bin/python -m stack",
        )
    return found


def _compile(requirements: str, *options: str) -> str:
    """Resolve and return the lock's text.

    Raises:
        StackError: The requirements do not resolve, or the index was not reached.
    """
    # The caller's uv settings would change the result; the index is the one that downloads use.
    env = {key: value for key, value in os.environ.items() if not key.startswith("UV_")}
    command = [
        find_uv(),
        "pip",
        "compile",
        "-q",
        "--no-config",
        "--no-header",
        "--no-emit-index-url",
    ]
    command += ["--default-index", index.index_url(), *options, "-"]
    done = subprocess.run(
        command, input=requirements, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        # uv writes its reasons as a tree with marks in front.
        reason = " ".join(line.lstrip("×╰─▶├│ ") for line in lines)
        raise StackError(
            f"the requirements could not be resolved: {index.without_credentials(reason)[:300]}",
            "check the network; `uv pip compile` by hand tells more",
        )
    return done.stdout


def resolve(pin: Pin, version: str, arch: str) -> str:
    """The lock of one Python and architecture, as of the pin's date.

    ``vllm`` itself is left out: the constraint ``vllm==0.22.1`` would say nothing of our wheel.
    """
    body = _compile(
        f"{pin.project}=={pin.version}\n",
        *("--exclude-newer", pin.exclude_newer, "--no-emit-package", pin.project),
        *("--python-version", version, "--python-platform", PLATFORM.format(arch=arch)),
        *("--only-binary", pin.project),
    )
    head = (
        f"# What vLLM {pin.version} runs with, as of {pin.exclude_newer}: Python {version}, "
        f"Linux {arch} (glibc 2.28 or newer).\n"
        f"# Made by `{COMMAND}`. Use: pip install -c FILE WHEEL\n"
    )
    return head + body


def tool_date(text: str) -> str:
    """The date in the head of ``requirements.txt``.

    Raises:
        StackError: There is none.
    """
    match = re.search(r"^# As of (\d{4}-\d{2}-\d{2})", text, re.M)
    if match is None:
        raise StackError(
            f"{TOOL_LOCK.name} has no line '# As of YYYY-MM-DD'",
            f"give one: {COMMAND} --tool YYYY-MM-DD",
        )
    return match[1]


def resolve_tool(date: str) -> str:
    """The tool's own requirements for every Python and architecture, with digests, as of a date."""
    body = _compile(
        TOOL_INPUT.read_text(encoding="utf-8"),
        *("--universal", "--generate-hashes", "--exclude-newer", date, "--python-version", "3.10"),
        *("--no-annotate",),
    )
    return (
        f"# What the stack tool runs with, from {TOOL_INPUT.name}.\n# As of {date}; "
        f"made by `{COMMAND} --tool {date}`.\n" + body
    )


def all_locks(pin: Pin) -> Iterator[tuple[Path, str]]:
    """Each lock under ``constraints/`` and what it should contain."""
    for version, arch in targets(pin):
        yield lock_path(version, arch), resolve(pin, version, arch)


def differences(path: Path, wanted: str) -> list[str]:
    """The lines in which a lock differs, as ``+ name==1`` and ``- name==2``; comments count too."""
    there = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = difflib.ndiff(there.splitlines(), wanted.splitlines())
    return [line for line in lines if line[:2] in ("+ ", "- ")]


def strays(pin: Pin) -> list[Path]:
    """Locks in the folder that no target has: a Python that the release no longer supports."""
    known = {lock_path(*target) for target in targets(pin)}
    return sorted(path for path in CONSTRAINTS.glob("*.txt") if path not in known)
