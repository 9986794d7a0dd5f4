"""The environments: made anew when they must be, kept when they may be, and whole or not there."""

from __future__ import annotations

import sys

import pytest

from stack.errors import StackError
from stack.pin import ROOT, load_pin
from tests.rings import environment
from tests.rings.environment import Interpreter

PIN_TEXT = 'version = "0.22.1"\n[build]\nnumber = 3\n'
PYTHON = Interpreter("python3.12", (3, 12))


def test_the_wheels_name_follows_the_pin():
    assert environment.wheel_name(PIN_TEXT, "aarch64") == "vllm-0.22.1+sm12x.3-*_aarch64.whl"
    real = environment.wheel_name((ROOT / "upstream.toml").read_text(), "x86_64")
    assert real == f"vllm-{load_pin().local_version}-*_x86_64.whl"


def test_a_pin_without_a_version_is_an_error():
    with pytest.raises(StackError, match="release.version"):
        environment.wheel_name("[build]\nnumber = 3\n", "x86_64")


def test_a_missing_lock_is_an_error_and_not_another_lock(tmp_path):
    (tmp_path / "constraints").mkdir()
    (tmp_path / "constraints" / "py311-x86_64.txt").touch()
    with pytest.raises(StackError, match=r"py312-x86_64\.txt is missing"):
        environment.lock_for(PYTHON, "x86_64", tmp_path)
    right = environment.lock_for(Interpreter("p", (3, 11)), "x86_64", tmp_path)
    assert right.name == "py311-x86_64.txt"


@pytest.mark.parametrize("version", [(3, 9), (3, 15)])
def test_an_unsupported_python_is_an_error(monkeypatch, version):
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    with pytest.raises(StackError, match=rf"Python 3\.{version[1]} is not supported"):
        environment.running()


@pytest.mark.parametrize(("system", "machine"), [("linux", "riscv64"), ("darwin", "arm64")])
def test_a_machine_without_a_wheel_is_an_error(monkeypatch, system, machine):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(StackError, match=machine):
        environment.architecture()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A test environment in ``tmp_path``; ``made.ran`` records the commands in place of running."""

    class Made:
        ran: list = []
        lock, wheel = tmp_path / "lock.txt", tmp_path / "x.whl"
        folder = tmp_path / ".build" / "test-env"
        fails = False

        def make(self, python=PYTHON):
            self.ran.clear()
            return environment.make_test_env(python, tmp_path / "uv", self.lock, self.wheel)

    made = Made()

    def run(command, failure, env=None):
        made.ran.append([str(part) for part in command[1:]])
        if "venv" in made.ran[-1]:
            made.folder.mkdir(parents=True)
        if made.fails and "install" in made.ran[-1]:
            raise StackError(failure)

    requirements = tmp_path / "requirements.txt"
    for path in (made.lock, made.wheel, requirements):
        path.write_text(path.name)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "TEST_ENV", made.folder)
    monkeypatch.setattr(environment, "TEST_REQUIREMENTS", requirements)
    monkeypatch.setattr(environment, "_run", run)
    made.requirements = requirements
    return made


def test_an_environment_is_made_once(made):
    assert made.make() == "made"
    install = next(command for command in made.ran if "install" in command)
    assert [str(made.lock), str(made.requirements), str(made.wheel)] == [
        install[install.index("--constraint") + 1],
        install[install.index("--requirement") + 1],
        install[-1],
    ]
    assert made.make() == "unchanged"
    assert made.ran == []


def test_another_wheel_is_installed_alone(made):
    made.make()
    made.wheel.write_text("newer")
    assert made.make() == "wheel replaced"
    assert not any("venv" in command for command in made.ran)
    install = made.ran[0]
    assert "--no-deps" in install and install[-1] == str(made.wheel)
    assert made.make() == "unchanged"


@pytest.mark.parametrize("what", ["lock", "requirements", "python"])
def test_another_lock_requirement_or_python_makes_it_anew(made, what):
    made.make()
    (made.folder / "left-over").touch()
    if what != "python":
        getattr(made, what).write_text("newer")
    python = Interpreter("python3.13", (3, 13)) if what == "python" else PYTHON
    assert made.make(python) == "made"
    assert not (made.folder / "left-over").exists()


@pytest.mark.parametrize("first", ["made", "wheel replaced"])
def test_a_broken_install_is_not_taken_for_whole(made, first):
    if first == "wheel replaced":
        made.make()
        made.wheel.write_text("newer")
    made.fails = True
    with pytest.raises(StackError, match="the wheel was not installed"):
        made.make()
    made.fails = False
    assert made.make() == "made"


def test_a_digest_tells_contents_and_words_apart(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, text in zip(paths, ("x", "yz"), strict=True):
        path.write_text(text)
    first = environment.digest(paths, "w")
    paths[0].write_text("xy")
    paths[1].write_text("z")
    assert first != environment.digest(paths, "w")
    assert environment.digest([], "ab", "c") != environment.digest([], "a", "bc")
