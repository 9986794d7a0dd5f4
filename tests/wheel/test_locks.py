"""The locks: all there, of one date, and true to what the wheel says that it requires."""

from __future__ import annotations

import re
import subprocess
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from stack import download, locks
from stack.errors import StackError
from stack.pin import ROOT, load_pin

PIN = load_pin()
TARGETS = locks.targets(PIN)
NAMES = [f"py3{minor}-{arch}.txt" for minor in range(10, 15) for arch in ("x86_64", "aarch64")]


def read(path: Path) -> dict[str, str]:
    """Package: version. Every line that is no comment has to be such a pair."""
    pairs = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("#") or not line.strip():
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)", line.strip())
        assert match, line
        pairs[str(canonicalize_name(match[1]))] = match[2]
    return pairs


def environment(version: str, arch: str) -> dict[str, str]:
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{version}.0",
        "os_name": "posix",
        "platform_machine": arch,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{version}.0",
        "python_version": version,
        "sys_platform": "linux",
    }


def test_the_names_are_those_that_a_user_guesses():
    assert sorted(path.name for path in (ROOT / "constraints").glob("*.txt")) == sorted(NAMES)
    assert sorted(locks.lock_path(*target).name for target in TARGETS) == sorted(NAMES)
    assert locks.strays(PIN) == []


@pytest.mark.parametrize(("version", "arch"), TARGETS)
def test_a_lock_has_the_pins_torch_and_triton_and_names_no_machine(version, arch):
    path = locks.lock_path(version, arch)
    lock = read(path)
    assert lock["torch"] == PIN.torch and lock["triton"] == PIN.triton
    assert lock["nvidia-nccl-cu13"] == "2.28.9", "constraints/README.md says so"
    assert lock["cuda-toolkit"].startswith(PIN.cuda + ".")
    assert "vllm" not in lock
    text = path.read_text(encoding="utf-8")
    assert "://" not in text and "/tmp" not in text and "/home" not in text
    head = text.splitlines()[0]
    assert PIN.exclude_newer in head and f"Python {version}" in head and arch in head


def unmet(lock: dict[str, str], requirements: list[str], env: dict[str, str]) -> list[str]:
    """The requirements (with their extras' own left aside) that a lock does not satisfy."""
    wrong = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate(env | {"extra": ""}):
            continue
        version = lock.get(str(canonicalize_name(requirement.name)))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{text}: {version}")
    return wrong


@pytest.mark.network
@pytest.mark.parametrize(("version", "arch"), TARGETS)
def test_every_requirement_of_the_wheel_is_satisfied(version, arch):
    with zipfile.ZipFile(download.fetch(PIN.wheels[arch], project="vllm")) as wheel:
        data = wheel.read(f"vllm-{PIN.version}.dist-info/METADATA")
    requirements = BytesParser().parsebytes(data).get_all("Requires-Dist")
    assert len(requirements) > 60
    lock = read(locks.lock_path(version, arch))
    env = environment(version, arch)
    assert unmet(lock, requirements, env) == []
    # The check finds what is missing and what is too old.
    assert unmet(lock | {"numba": "0.1"}, requirements, env) == ["numba==0.65.0: 0.1"]
    assert len(unmet({}, requirements, env)) > 50


def test_the_tools_lock_has_digests_and_every_requirement():
    text = (ROOT / "stack" / "requirements.txt").read_text(encoding="utf-8")
    assert "://" not in text
    entries = re.findall(
        r"^([a-z0-9._-]+)==\S+.*?((?:\n    --hash=sha256:[0-9a-f]{64}.*)+)", text, re.M
    )
    heads = re.findall(r"^[a-z0-9._-]+==", text, re.M)
    assert len(entries) == len(heads) > 10, "each entry has a digest"
    locked = {name for name, _ in entries}
    for line in locks.TOOL_INPUT.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            assert canonicalize_name(Requirement(line).name) in locked
    assert locks.tool_date(text)


@pytest.mark.parametrize("told", ["", ">=3.10", ">=3.10,<4", "==3.12.*"])
def test_another_form_of_requires_python_is_an_error(told, monkeypatch):
    from dataclasses import replace

    with pytest.raises(StackError, match="requires-python"):
        locks.python_versions(replace(PIN, requires_python=told))


def test_differences_and_strays(tmp_path, monkeypatch):
    path = tmp_path / "py312-x86_64.txt"
    assert locks.differences(path, "a==1\n") == ["+ a==1"]
    path.write_text("a==1\nb==1\n")
    assert locks.differences(path, "a==1\nb==1\n") == []
    assert locks.differences(path, "a==2\nb==1\n") == ["- a==1", "+ a==2"]
    monkeypatch.setattr(locks, "CONSTRAINTS", tmp_path)
    (tmp_path / "py39-x86_64.txt").write_text("")
    assert locks.strays(PIN) == [tmp_path / "py39-x86_64.txt"]


def test_requirements_that_do_not_resolve_are_one_line(monkeypatch):
    def failed(command, **options):
        return subprocess.CompletedProcess(
            command,
            1,
            "",
            "  × No solution found\n  ╰─▶ Because a is not there,\n      it fails.\n",
        )

    monkeypatch.setattr(locks.subprocess, "run", failed)
    monkeypatch.setattr(locks, "find_uv", lambda: "uv")
    with pytest.raises(StackError, match="No solution found Because a is not there, it fails"):
        locks.resolve(PIN, "3.12", "x86_64")


@pytest.mark.network
@pytest.mark.slow
def test_a_lock_comes_out_the_same_when_it_is_resolved_again():
    wanted = locks.resolve(PIN, "3.12", "aarch64")
    assert locks.differences(locks.lock_path("3.12", "aarch64"), wanted) == []
