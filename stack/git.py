"""Run git the same way everywhere: no shell, no user configuration, a fixed identity."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from stack.errors import StackError

CONFIG_FILE = Path(__file__).with_name("gitconfig")
# Git 2.32 knows GIT_CONFIG_GLOBAL; Ubuntu 22.04 ships 2.34. The tests were run with 2.39 and 2.55.
OLDEST = (2, 34)
# The committer of every imported commit and the author of the release's commit. The date is no
# event: it is fixed so that a commit has the same id on every machine.
NAME = "vLLM SM12x stack"
EMAIL = "stack@localhost"
EPOCH = "1767225600 +0000"


@dataclass(frozen=True)
class Output:
    """What a git command left: its exit status and the bytes of its two streams."""

    returncode: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as UTF-8 (undecodable bytes as surrogates), without the last newline."""
        return self.stdout.decode("utf-8", "surrogateescape").removesuffix("\n")

    @property
    def lines(self) -> list[str]:
        """Standard output as lines, split at newlines alone."""
        return self.text.split("\n") if self.stdout else []

    @property
    def fields(self) -> list[str]:
        """Standard output of a ``-z`` command, split at its NULs."""
        text = self.stdout.decode("utf-8", "surrogateescape")
        return text.removesuffix("\0").split("\0") if text else []

    @property
    def last_error(self) -> str:
        """The last line on standard error that is no hint, or the exit status in words."""
        text = self.stderr.decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        telling = [line for line in lines if not line.startswith(("hint:", "warning:"))]
        return (telling or lines or [f"exit status {self.returncode}"])[-1]


def environment(cwd: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a git command that runs in ``cwd``.

    Every ``GIT_*`` variable of the caller is dropped. ``stack/gitconfig`` stands in for the user's
    and the system's configuration, and is given on the command line's level too, above the
    repository's own. Git does not look for a repository above ``cwd``: a work tree that lacks
    its ``.git`` is an error, not a command run on the repository that holds it.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env |= {
        "LC_ALL": "C",
        "LANGUAGE": "",
        "TZ": "UTC",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": str(CONFIG_FILE),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "include.path",
        "GIT_CONFIG_VALUE_0": str(CONFIG_FILE),
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_CEILING_DIRECTORIES": str(cwd.resolve().parent),
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_EDITOR": "true",
        "GIT_PAGER": "cat",
        "GIT_AUTHOR_NAME": NAME,
        "GIT_AUTHOR_EMAIL": EMAIL,
        "GIT_AUTHOR_DATE": EPOCH,
        "GIT_COMMITTER_NAME": NAME,
        "GIT_COMMITTER_EMAIL": EMAIL,
        "GIT_COMMITTER_DATE": EPOCH,
    }
    return env | dict(extra or {})


@cache
def _executable() -> str:
    found = shutil.which("git")
    if found is None:
        raise StackError(
            "git is not installed, or not on PATH",
            f"install git {OLDEST[0]}.{OLDEST[1]} or newer (Debian, Ubuntu: apt-get install git)",
        )
    shown = subprocess.run([found, "--version"], capture_output=True, check=False).stdout
    words = shown.decode("ascii", "replace").split()
    numbers = words[2].split(".") if len(words) > 2 else []
    version = tuple(int(part) for part in numbers[:2] if part.isdigit())
    if version < OLDEST:
        raise StackError(
            f"git is too old: {' '.join(words) or found}",
            f"install git {OLDEST[0]}.{OLDEST[1]} or newer",
        )
    return found


def git(
    *args: str | os.PathLike[str],
    cwd: Path,
    check: bool = True,
    input: bytes | str | None = None,
    env: Mapping[str, str] | None = None,
    config: Mapping[str, str] | None = None,
) -> Output:
    """Run ``git ARGS`` in ``cwd`` and return its output.

    Args:
        args: The subcommand and its arguments; no shell sees them.
        cwd: An existing folder: a work tree or a bare repository.
        check: Raise on a non-zero exit status.
        input: Standard input; text is sent as UTF-8. Without it, standard input is empty.
        env: Variables set above the clean environment (``GIT_INDEX_FILE``, an author).
        config: Settings above those of ``stack/gitconfig``, as in ``{"rerere.enabled": "true"}``.

    Raises:
        StackError: Git is missing or too old, ``cwd`` does not exist, or (with ``check``) the
            command failed; the message ends with git's last line.
    """
    cwd = Path(cwd)
    if not cwd.is_dir():
        raise StackError(f"{cwd} does not exist", "run `python -m stack import` first")
    command = [_executable()]
    for key, value in (config or {}).items():
        command += ["-c", f"{key}={value}"]
    command += [os.fspath(arg) for arg in args]
    data = input.encode("utf-8", "surrogateescape") if isinstance(input, str) else input
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(cwd, env),
        input=b"" if data is None else data,
        capture_output=True,
        check=False,
    )
    output = Output(done.returncode, done.stdout, done.stderr)
    if check and output.returncode:
        shown = " ".join(os.fspath(arg) for arg in args)
        raise StackError(
            f"git {os.fspath(args[0])} failed: {output.last_error}", f"in {cwd}: git {shown}"
        )
    return output
