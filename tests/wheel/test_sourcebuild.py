"""``--source``: what it asks for, and what it says of a build that failed. Nothing is compiled."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from stack import sourcebuild
from stack.errors import StackError
from stack.pin import load_pin
from stack.wheel_assemble import assemble

PIN = load_pin()


@pytest.fixture
def toolkit(tmp_path, monkeypatch) -> Path:
    """A stand-in for the CUDA toolkit, whose nvcc tells its release."""
    folder = tmp_path / "cuda"
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").write_text("")
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder))
    return folder


def test_the_toolkit_is_found(toolkit):
    assert sourcebuild.find_toolkit("13.0") == toolkit


@pytest.mark.parametrize("missing", ["bin/nvcc", "include/cuda_runtime.h"])
def test_no_toolkit(toolkit, missing):
    (toolkit / missing).unlink()
    with pytest.raises(StackError, match="no CUDA toolkit") as error:
        sourcebuild.find_toolkit("13.0")
    assert str(toolkit) in error.value.message and "CUDA_HOME" in error.value.hint


def test_a_toolkit_of_another_release(toolkit):
    with pytest.raises(StackError, match="is of CUDA 13.0, this vLLM's torch is of 12.8"):
        sourcebuild.find_toolkit("12.8")


def test_only_this_machine_can_be_compiled_for(monkeypatch):
    monkeypatch.setattr(sourcebuild.platform, "machine", lambda: "x86_64")
    with pytest.raises(StackError, match="this machine .x86_64. alone, not for aarch64"):
        sourcebuild.check_machine(("aarch64",))
    with pytest.raises(StackError, match="x86_64 and aarch64"):
        sourcebuild.check_machine(("x86_64", "aarch64"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sourcebuild.shutil, "which", lambda name: None)
    with pytest.raises(StackError, match="no C\\+\\+ compiler"):
        sourcebuild.check_machine(("x86_64",))


def test_the_environment_of_the_build(toolkit, monkeypatch):
    monkeypatch.delenv(sourcebuild.ARCH_LIST_ENV, raising=False)
    monkeypatch.setenv("VLLM_USE_PRECOMPILED", "1")
    env = sourcebuild.environment(PIN, toolkit, 3)
    assert env["VLLM_VERSION_OVERRIDE"] == PIN.local_version
    assert env["MAX_JOBS"] == "3" and env["CUDA_HOME"] == str(toolkit)
    assert env["TORCH_CUDA_ARCH_LIST"] == "12.0;12.1"
    assert env["PATH"].startswith(f"{toolkit}/bin:")
    assert "VLLM_USE_PRECOMPILED" not in env, "nothing would be compiled"
    monkeypatch.setenv(sourcebuild.ARCH_LIST_ENV, "9.0")
    assert sourcebuild.environment(PIN, toolkit, None)["TORCH_CUDA_ARCH_LIST"] == "9.0"
    with pytest.raises(StackError, match="--jobs is 0"):
        sourcebuild.environment(PIN, toolkit, 0)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (
            "fatal: unable to access 'https://host/x.git/': Could not",
            "fetch sources from https://host",
        ),
        (
            "ssh: Could not resolve host: example.org\nerror: later",
            "fetch sources from example.org",
        ),
        ("gcc: fatal error: No space left on device", "no space left"),
        ("error: Failed to fetch: `torch`", "build's requirements"),
        ("ninja: x\nKilled\nninja: build stopped", "lack of memory"),
        (
            "CMake Error at a/b.cmake:90 (message):\n  No CUDA.\n",
            "stopped at a/b.cmake:90: No CUDA.",
        ),
        (
            "CMake Error at b.txt:14 (project):\n  Running\n\n   'x'\n\n\n-- Bye",
            "b.txt:14: Running 'x'",
        ),
        ("a.cu(3): error: expected a ;\nbye\n  cause: error", "a.cu(3): error: expected a ;"),
        ("", "without a word"),
    ],
)
def test_a_failed_builds_log_is_told_in_one_line(log, message):
    told, hint = sourcebuild.explain(log)
    assert message in told and "\n" not in told and hint


def fake_uv(tmp_path, body: str) -> str:
    path = tmp_path / "uv"
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_failed_build_names_the_log(tmp_path, monkeypatch, capfd):
    uv = fake_uv(tmp_path, "print('a.cu(3): error: expected a ;'); raise SystemExit(1)")
    monkeypatch.setattr(sourcebuild.locks, "find_uv", lambda: uv)
    log = tmp_path / "build.log"
    log.write_text("error: of an earlier step\n")
    env = {"PATH": ""}
    with pytest.raises(StackError, match="expected a ;") as error:
        sourcebuild.compile_wheel(tmp_path, tmp_path, Path(sys.executable), env, log)
    assert str(log) in error.value.hint
    assert "expected a ;" in log.read_text() and "expected a ;" in capfd.readouterr().err


def test_a_build_that_makes_no_wheel_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(sourcebuild.locks, "find_uv", lambda: fake_uv(tmp_path, "print('done')"))
    with pytest.raises(StackError, match="made no wheel"):
        sourcebuild.compile_wheel(
            tmp_path, tmp_path, Path(sys.executable), {"PATH": ""}, tmp_path / "log"
        )


def test_a_compiled_wheel_gets_our_package_too(tmp_path, make_wheel, upstream_files):
    """The wheel that upstream's build makes bears our version already."""
    version = "1.2.3+sm12x.4"
    files = {}
    for name, (data, mode) in upstream_files.items():
        if name.endswith(("METADATA", "_version.py")):
            data = data.replace(b"Version: 1.2.3\nSummary", f"Version: {version}\nSummary".encode())
            data = data.replace(b"'1.2.3'", f"'{version}'".encode())
            data = data.replace(b"(1, 2, 3)", b"(1, 2, 3, 'sm12x.4')")
        files[name.replace("vllm-1.2.3.dist", f"vllm-{version}.dist")] = (data, mode)
    path = make_wheel(files, "cp38-abi3-linux_x86_64", version)
    made = assemble(
        path,
        tmp_path / "dist",
        old_version=version,
        version=version,
        note="n",
        changes=[],
        kernels={"vllm_sm12x/__init__.py": b""},
        licence=b"l",
    )
    assert made.path.name == f"vllm-{version}-cp38-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(made.path) as wheel:
        assert f"Version: {version}\n".encode() in wheel.read(f"vllm-{version}.dist-info/METADATA")
        assert f"'{version}'".encode() in wheel.read("vllm/_version.py")
        assert "vllm_sm12x/__init__.py" in wheel.namelist()


def test_the_build_environment_has_what_the_tree_builds_with(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["a>=1", "torch == 2.11.0"]\n'
    )
    asked = []
    monkeypatch.setattr(sourcebuild, "run_logged", lambda command, env, log: asked.append(command))
    python = sourcebuild.build_python(tmp_path, tmp_path / "env", PIN, {}, tmp_path / "log")
    assert python == tmp_path / "env" / "bin" / "python"
    venv, install = asked
    assert "venv" in venv and venv[-1] == str(tmp_path / "env")
    assert install[-2:] == ["a>=1", "torch == 2.11.0"]
    assert install[install.index("--exclude-newer") + 1] == PIN.exclude_newer
