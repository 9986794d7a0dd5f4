"""Receipts, the kernels' digest, and the choices of the command line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import jsonschema
import pytest

from stack import wheel, wheel_kernels, wheel_receipt
from stack.errors import StackError
from stack.git import git
from stack.pin import ROOT
from stack.wheel_assemble import Assembled

SCHEMA = json.loads((ROOT / "stack" / "receipt.schema.json").read_text(encoding="utf-8"))


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    ("told", "machine", "expected"),
    [
        (None, "x86_64", ("x86_64",)),
        (None, "AMD64", ("x86_64",)),
        (None, "arm64", ("aarch64",)),
        ("aarch64", "x86_64", ("aarch64",)),
        ("all", "riscv64", ("x86_64", "aarch64")),
    ],
)
def test_architectures(monkeypatch, told, machine, expected):
    monkeypatch.setattr(wheel.platform, "machine", lambda: machine)
    assert wheel.architectures(told) == expected


@pytest.mark.parametrize(
    ("told", "machine"), [("ppc64le", "x86_64"), (None, "riscv64"), (None, "")]
)
def test_an_unknown_architecture_is_an_error_that_lists_the_known(monkeypatch, told, machine):
    monkeypatch.setattr(wheel.platform, "machine", lambda: machine)
    with pytest.raises(StackError, match=told or machine or "unknown") as error:
        wheel.architectures(told)
    assert "x86_64" in error.value.hint and "aarch64" in error.value.hint


@pytest.fixture
def kernels(tmp_path) -> Path:
    package = tmp_path / "kernels" / "vllm_sm12x"
    (package / "ops" / "__pycache__").mkdir(parents=True)
    (package / "__init__.py").write_bytes(b"")
    (package / "ops" / "x.py").write_bytes(b"X = 1\n")
    (package / "py.typed").write_bytes(b"")
    (package / "ops" / "__pycache__" / "x.cpython-312.pyc").write_bytes(b"\0")
    (package / ".hidden.py").write_bytes(b"\0")
    return package.parent


def test_kernels_without_compiled_and_hidden_files(kernels):
    assert wheel_kernels.read_kernels(kernels) == {
        "vllm_sm12x/__init__.py": b"",
        "vllm_sm12x/ops/x.py": b"X = 1\n",
        "vllm_sm12x/py.typed": b"",
    }


def test_the_kernels_digest_is_what_sha256sum_gives(kernels):
    digest = wheel_kernels.tree_digest(wheel_kernels.read_kernels(kernels))
    command = (
        "find vllm_sm12x -type f -not -name '*.pyc' -not -name '.*' | LC_ALL=C sort "
        "| xargs sha256sum | sha256sum"
    )
    shown = subprocess.run(
        ["sh", "-c", command], cwd=kernels, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split()[0] == digest


@pytest.mark.parametrize("name", ["x.py.orig", "x.py~", "x.so", "notes"])
def test_a_left_over_in_the_kernels_is_an_error(kernels, name):
    (kernels / "vllm_sm12x" / "ops" / name).write_bytes(b"")
    with pytest.raises(StackError, match=name.replace(".", r"\.")):
        wheel_kernels.read_kernels(kernels)


def test_a_link_in_the_kernels_is_an_error(kernels):
    (kernels / "vllm_sm12x" / "link.py").symlink_to("py.typed")
    with pytest.raises(StackError, match="symbolic link"):
        wheel_kernels.read_kernels(kernels)


def test_no_kernels(tmp_path):
    with pytest.raises(StackError, match="no Python package"):
        wheel_kernels.read_kernels(tmp_path)


def test_the_state_of_a_repository(tmp_path):
    assert wheel_receipt.repository_state(tmp_path) == {"commit": None, "dirty": None}
    git("init", "-q", cwd=tmp_path)
    assert wheel_receipt.repository_state(tmp_path) == {"commit": None, "dirty": None}
    (tmp_path / "a").write_text("a")
    git("add", "a", cwd=tmp_path)
    git("commit", "-q", "-m", "a", cwd=tmp_path)
    head = git("rev-parse", "HEAD", cwd=tmp_path).text
    assert wheel_receipt.repository_state(tmp_path) == {"commit": head, "dirty": False}
    (tmp_path / "b").write_text("b")
    assert wheel_receipt.repository_state(tmp_path) == {"commit": head, "dirty": True}


def test_claims(tmp_path):
    path = tmp_path / "claims.toml"
    assert wheel_receipt.claims(path) == []
    path.write_text(
        '[[claim]]\nclaim = "c"\nwhere = "CPU"\ndate = 2026-11-23\ncommand = "./test.sh"\n'
    )
    assert wheel_receipt.claims(path) == [
        {"claim": "c", "where": "CPU", "date": "2026-11-23", "command": "./test.sh"}
    ]
    for wrong in ('where = "the moon"', 'where = "CPU"\nextra = 1'):
        path.write_text(f'[[claim]]\nclaim = "c"\ndate = 2026-11-23\ncommand = "x"\n{wrong}\n')
        with pytest.raises(StackError, match="is no claim"):
            wheel_receipt.claims(path)
    path.write_text("[[claim")
    with pytest.raises(StackError, match="claims.toml is not valid TOML"):
        wheel_receipt.claims(path)


def test_the_claims_of_this_repository_are_well_formed():
    wheel_receipt.claims(ROOT / "tests" / "claims.toml")


def test_a_failed_write_leaves_no_half_receipt(tmp_path, monkeypatch):
    assembled = Assembled(tmp_path / "vllm-1-a-b-c.whl", "0" * 64, 1, (), (), ())
    monkeypatch.setattr(Path, "replace", lambda self, other: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        wheel_receipt.write_receipt(assembled, {})
    assert list(tmp_path.iterdir()) == []
