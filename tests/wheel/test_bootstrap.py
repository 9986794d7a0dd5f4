"""``build.sh`` and the environment that it makes: whole, or made anew; never somebody else's."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stack import bootstrap
from stack.errors import StackError
from stack.pin import ROOT


@pytest.fixture
def root(tmp_path) -> Path:
    """A checkout whose tool needs no package."""
    folder = tmp_path / "a checkout"
    (folder / "stack").mkdir(parents=True)
    (folder / "stack" / "requirements.txt").write_text("# nothing\n")
    return folder


@pytest.fixture
def quick(monkeypatch) -> None:
    """Stand in for ``python -m venv`` and pip, which take seconds."""

    def run(command: list[str], failed: str) -> None:
        folder = Path(command[-1])
        if "venv" in command:
            (folder / "bin").mkdir()
            (folder / "bin" / "python").symlink_to(sys.executable)
            (folder / "lib" / "python3" / "site-packages").mkdir(parents=True)

    monkeypatch.setattr(bootstrap, "_run", run)


def mark(root: Path) -> Path:
    return root / ".venv" / bootstrap.MARK


def test_the_environment_is_made_once(root, monkeypatch):
    python = bootstrap.ensure(root)
    shown = subprocess.run(
        [str(python), "-c", "import sys; print(sys.prefix); print(sys.path)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    assert shown[0] == str(root / ".venv") and str(root) in shown[1]
    monkeypatch.setattr(bootstrap, "_make", lambda *args: pytest.fail("made again"))
    assert bootstrap.ensure(root) == python


@pytest.mark.parametrize("how", ["interrupted", "other requirements", "no interpreter", "moved"])
def test_what_is_not_whole_is_made_anew(root, how, quick):
    bootstrap.ensure(root)
    left = root / ".venv" / "left-over"
    left.write_text("")
    if how == "interrupted":
        mark(root).write_text("unfinished\n")
    elif how == "other requirements":
        bootstrap.requirements(root).write_text("# still nothing\n")
    elif how == "no interpreter":
        (root / ".venv" / "bin" / "python").unlink()
    else:
        root = root.rename(root.with_name("elsewhere"))
        left = root / ".venv" / "left-over"
    assert bootstrap.ensure(root).exists()
    assert not left.exists()
    assert mark(root).read_text() == bootstrap.stamp(root)


def test_an_interruption_leaves_no_stamp(root, monkeypatch, quick):
    real = bootstrap._run

    def interrupted(command, failed):
        if "pip" in command:
            raise KeyboardInterrupt
        real(command, failed)

    with monkeypatch.context() as patched:
        patched.setattr(bootstrap, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bootstrap.ensure(root)
    assert mark(root).read_text() == "unfinished\n"
    bootstrap.ensure(root)
    assert mark(root).read_text() == bootstrap.stamp(root)


def test_somebody_elses_environment_is_left_alone(root):
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "mine").write_text("")
    with pytest.raises(StackError, match="was not made by build.sh") as error:
        bootstrap.ensure(root)
    assert "move it away" in error.value.hint
    assert (root / ".venv" / "bin" / "mine").exists()


def test_no_git(root, monkeypatch):
    monkeypatch.setenv("PATH", str(root))
    with pytest.raises(StackError, match="git is not installed") as error:
        bootstrap.ensure(root)
    assert "apt-get install git" in error.value.hint


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_a_python_without_venv(root, monkeypatch, missing):
    real = bootstrap.importlib.util.find_spec
    monkeypatch.setattr(
        bootstrap.importlib.util, "find_spec", lambda n: None if n == missing else real(n)
    )
    with pytest.raises(StackError, match="cannot make virtual environments") as error:
        bootstrap.ensure(root)
    assert "python3-venv" in error.value.hint and "PYTHON=" in error.value.hint
    assert not (root / ".venv").exists()


def test_no_network(root, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    bootstrap.requirements(root).write_text(f"not-there==1 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(StackError, match="no connection to the package index") as error:
        bootstrap.ensure(root)
    assert "\n" not in error.value.message and "network" in error.value.hint
    assert mark(root).read_text() == "unfinished\n"


def test_a_package_with_a_wrong_digest(root, tmp_path, monkeypatch):
    import zipfile

    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "thing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\n")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    bootstrap.requirements(root).write_text(f"thing==1 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(StackError, match="wrong digest"):
        bootstrap.ensure(root)


def test_a_checkout_that_cannot_be_written(root, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(root / ".build"))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(StackError, match="Permission denied"):
        bootstrap.ensure(root)


def build_sh(*args: str, root: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", str(root / "build.sh"), *args],
        env=os.environ | env,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def test_build_sh_without_a_fitting_python(tmp_path):
    for name in ("python3", "python3.9"):
        old = tmp_path / name
        old.write_text("#!/bin/sh\nexit 1\n")
        old.chmod(0o755)
    for tool in ("sh", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = build_sh(PATH=str(tmp_path), PYTHON="")
    assert done.returncode == 1
    assert "no Python 3.10 or newer: tried python3 " in done.stderr
    assert "PYTHON=" in done.stderr


def test_build_sh_uses_the_python_that_it_is_told():
    done = build_sh(PYTHON="/nonexistent/python3")
    assert done.returncode == 1
    assert "tried /nonexistent/python3" in done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="help on 3.10 wants the environment")
def test_help_needs_no_environment(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copytree(ROOT / "stack", copy / "stack", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("build.sh", "upstream.toml"):
        shutil.copy(ROOT / name, copy / name)
    done = build_sh("--help", root=copy, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert "--arch" in done.stdout and "--source" in done.stdout
    assert not (copy / ".venv").exists()
