"""Run the stack tool in ``.venv``, made from ``requirements.txt`` where it is not whole.

``build.sh`` runs this file with any Python that is new enough; it imports the standard library
alone. ``.venv`` bears a mark from its first moment and a stamp once it is whole: what an
interrupted run left is made anew, and somebody else's ``.venv`` is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # Python put stack/ itself there.
    sys.path[0] = str(ROOT)

from stack.errors import StackError  # noqa: E402

MARK = "made-by-build.sh"


def requirements(root: Path) -> Path:
    """The locked requirements, each with its digests."""
    return root / "stack" / "requirements.txt"


def stamp(root: Path) -> str:
    """What the environment follows from: the requirements, the Python, and where it all lies."""
    digest = hashlib.sha256(requirements(root).read_bytes()).hexdigest()
    return f"{digest} {sys.version_info[0]}.{sys.version_info[1]} {sys.base_prefix} {root}\n"


def ensure(root: Path = ROOT) -> Path:
    """The interpreter of the tool's environment; the environment is made where it is not whole.

    Raises:
        StackError: ``git``, ``venv`` or the package index is missing, a digest is wrong, the disk
            is full, or ``.venv`` is not ours.
    """
    if shutil.which("git") is None:
        raise StackError(
            "git is not installed, or not on PATH",
            "install git (Debian, Ubuntu: apt-get install git)",
        )
    folder = root / ".venv"
    python = folder / "bin" / "python"
    mark = folder / MARK
    try:
        wanted = stamp(root)
        if _read(mark) == wanted and python.exists():
            return python
        with _locked(root / ".build" / "venv.lock"):
            if _read(mark) != wanted or not python.exists():
                _make(root, folder, mark)
                mark.write_text(wanted)
    except OSError as error:
        raise StackError(
            f"{error.filename or folder}: {error.strerror or error}",
            "free some space or mend the permissions, and run again",
        ) from None
    return python


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(root: Path, folder: Path, mark: Path) -> None:
    if folder.exists() and not mark.exists() and any(folder.iterdir()):
        raise StackError(
            f"{folder} was not made by build.sh, and is left alone", "move it away and run again"
        )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise StackError(
            f"{sys.executable} cannot make virtual environments (no venv or no ensurepip)",
            "install them (Debian, Ubuntu: apt-get install python3-venv), "
            "or name another Python: PYTHON=/path/to/python3 ./build.sh",
        )
    print(f"making {folder} (once)", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    mark.write_text("unfinished\n")
    _run([sys.executable, "-m", "venv", str(folder)], "the virtual environment could not be made")
    python = folder / "bin" / "python"
    _run(
        [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        + ["--no-input", "--require-hashes", "--only-binary", ":all:"]
        + ["-r", str(requirements(root))],
        "the tool's requirements could not be installed",
    )
    # So that `-m stack` is found whatever the working directory is.
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "stack-checkout.pth").write_text(f"{root}\n")


def _run(command: list[str], failed: str) -> None:
    env = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PIP_TARGET")
    }
    done = subprocess.run(
        command,
        env=env | {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR:", "Error:"))]
    reason = (errors or lines or [f"exit status {done.returncode}"])[-1]
    connection = [line for line in lines if "connection broken" in line or "SSLError" in line]
    if "No space left" in done.stdout:
        reason = "no space left on the disk"
    elif "DO NOT MATCH THE HASHES" in done.stdout:
        reason = "a package is not the one that stack/requirements.txt pins (wrong digest)"
    elif connection:
        reason = "no connection to the package index"
    raise StackError(
        f"{failed}: {reason}",
        "check the network (PIP_INDEX_URL and pip's configuration are respected) and the disk, "
        "and run again",
    )


def main(argv: list[str]) -> int:
    """Run ``python -m stack ARGV`` in the environment; does not return where that works out."""
    try:
        if {"-h", "--help"} & set(argv) and sys.version_info >= (3, 11):
            # Help needs no package; Python 3.10 alone needs one to read TOML.
            from stack.__main__ import main as stack_main

            return stack_main(argv)
        python = ensure()
    except StackError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  -> {error.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again", file=sys.stderr)
        return 130
    os.execv(python, [str(python), "-m", "stack", *argv])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
