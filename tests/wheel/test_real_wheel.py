"""The wheel of the pinned release, made for real: both architectures, from this checkout."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from email.parser import BytesParser
from pathlib import Path

import jsonschema
import pytest

from stack import download, wheel
from stack.checkout import Checkout
from stack.errors import StackError
from stack.pin import ARCHITECTURES, ROOT, load_pin
from stack.wheel_receipt import receipt_path

pytestmark = [pytest.mark.network, pytest.mark.slow]
PIN = load_pin()
INFO = f"vllm-{PIN.local_version}.dist-info"


def snapshot(folder: Path, *names: str) -> Path:
    """A copy of this checkout's parts, which nobody edits while the tests run."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """This checkout without the submodule."""
    names = ("upstream.toml", "LICENSE", "stack", "kernels", "patches")
    return snapshot(tmp_path_factory.mktemp("checkout"), *names)


@pytest.fixture(scope="module")
def made(tmp_path_factory, copied):
    """The wheels of both architectures, by architecture."""
    out = tmp_path_factory.mktemp("dist")
    wheels = wheel.build(ARCHITECTURES, out, checkout=Checkout(copied), echo=lambda line: None)
    return dict(zip(ARCHITECTURES, wheels, strict=True))


def test_a_second_build_gives_the_same_bytes(made, copied, tmp_path):
    umask = "import os; os.umask(0o077); "
    program = umask + "from stack.__main__ import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "wheel", "--arch", "all", "--out", str(tmp_path)],
        cwd=copied,
        env=os.environ | {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONHASHSEED": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert [path.name for path in paths] == [one.path.name for one in made.values()]
    for path, first in zip(paths, made.values(), strict=True):
        assert download.sha256_of(path) == first.sha256 == download.sha256_of(first.path)
        receipts = [json.loads(receipt_path(p).read_text()) for p in (path, first.path)]
        for receipt in receipts:
            receipt.pop("made")
        assert receipts[0] == receipts[1]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_receipt_is_valid_and_true(made, copied, arch):
    receipt = json.loads(receipt_path(made[arch].path).read_text(encoding="utf-8"))
    schema = json.loads((ROOT / "stack" / "receipt.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(receipt)
    told = receipt["wheel"]
    assert told["sha256"] == download.sha256_of(made[arch].path)
    assert told["size"] == made[arch].path.stat().st_size
    assert receipt["binaries"]["sha256"] == PIN.wheels[arch].sha256
    for patch in receipt["series"]:
        content = (copied / "patches" / patch["name"]).read_bytes()
        assert patch["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_differs_from_upstreams_wheel_is_what_the_receipt_says(made, arch):
    receipt = json.loads(receipt_path(made[arch].path).read_text(encoding="utf-8"))["wheel"]
    upstream = download.fetch(PIN.wheels[arch], project="vllm")
    with zipfile.ZipFile(upstream) as before, zipfile.ZipFile(made[arch].path) as after:
        old = {i.filename: (i.CRC, i.file_size, i.external_attr) for i in before.infolist()}
        new = {i.filename: (i.CRC, i.file_size, i.external_attr) for i in after.infolist()}
        metadata = BytesParser().parsebytes(after.read(f"{INFO}/METADATA"))
        before_metadata = BytesParser().parsebytes(
            before.read(f"vllm-{PIN.version}.dist-info/METADATA")
        )
        rows = list(csv.reader(io.StringIO(after.read(f"{INFO}/RECORD").decode())))
        namespace: dict = {}
        exec(after.read("vllm/_version.py"), namespace)
        entry_points = after.read(f"{INFO}/entry_points.txt")
        tags = BytesParser().parsebytes(after.read(f"{INFO}/WHEEL")).get_all("Tag")
        assert entry_points == before.read(f"vllm-{PIN.version}.dist-info/entry_points.txt")

    def package(names):
        return {name for name in names if ".dist-info/" not in name}

    assert package(new) - package(old) == set(receipt["added"])
    assert package(old) - package(new) == set(receipt["removed"])
    both = package(old) & package(new)
    assert {name for name in both if old[name] != new[name]} <= set(receipt["replaced"])
    assert "vllm_sm12x/dispatch.py" in new and "vllm_sm12x/dispatch.py" not in old
    assert {row[0] for row in rows} == set(new)
    assert not [name for name in new if name.endswith(".pyc")]

    assert metadata["Version"] == namespace["__version__"] == PIN.local_version
    assert namespace["__version_tuple__"][:3] == (0, 22, 1)
    assert tags == [f"cp38-abi3-manylinux_2_28_{arch}"]
    for key in ("Requires-Dist", "Provides-Extra", "Requires-Python", "Classifier", "Summary"):
        assert metadata.get_all(key) == before_metadata.get_all(key)


def test_the_wheel_verifies_when_unpacked(made, tmp_path):
    """``wheel unpack`` checks each file against RECORD: an implementation that is not ours."""
    path = made["x86_64"].path
    done = subprocess.run(
        [sys.executable, "-m", "wheel", "unpack", "-d", str(tmp_path), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    program = "import importlib.metadata as m; print(m.version('vllm'))"
    shown = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / f"vllm-{PIN.local_version}",
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == PIN.local_version


PATCH = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: A Name <a@example.com>
Date: Mon, 23 Nov 2026 00:00:00 +0000
Subject: [PATCH] Add {path}

A patch that a wheel made from binaries cannot carry.

Kind: tune
Scope: csrc
Upstream: none, a test
Drop-when: never
Depends: none
Tests: this one
---
 {path} | 1 +
 1 file changed, 1 insertion(+)
 create mode 100644 {path}

diff --git a/{path} b/{path}
new file mode 100644
index 0000000000000000000000000000000000000000..a5bce3fd2565d8f458555a0c6f42d0504a848bd5
--- /dev/null
+++ b/{path}
@@ -0,0 +1 @@
+test1
"""


@pytest.fixture
def checkout(tmp_path) -> Callable[..., Checkout]:
    """A checkout with a series of one patch that adds ``path``."""

    def make(path: str) -> Checkout:
        snapshot(tmp_path, "upstream.toml", "LICENSE", "kernels", "stack/shared-files")
        (tmp_path / "patches" / "core").mkdir(parents=True)
        (tmp_path / "patches" / "series").write_text("core/one.patch\n")
        (tmp_path / "patches" / "core" / "one.patch").write_text(PATCH.format(path=path))
        return Checkout(tmp_path)

    return make


@pytest.mark.parametrize("path", ["csrc/new.cu", "vllm/new.cpp", "nobody/knows.py"])
def test_a_patch_to_a_compiled_input_stops_the_build(checkout, tmp_path, monkeypatch, path):
    made = checkout(path)
    real = download.fetch

    def no_wheels(artifact, **options):
        assert not artifact.filename.endswith(".whl"), "refused before a long download"
        return real(artifact, **options)

    monkeypatch.setattr(download, "fetch", no_wheels)
    with pytest.raises(StackError, match=path) as error:
        wheel.build(("x86_64",), tmp_path / "dist", checkout=made, echo=lambda line: None)
    assert "patches/core/one.patch" in error.value.message and "--source" in error.value.hint
    assert not (tmp_path / "dist").exists()


def test_a_patch_that_adds_a_python_file_is_in_the_wheel(checkout, tmp_path):
    made = wheel.build(
        ("x86_64",), tmp_path / "dist", checkout=checkout("vllm/new.py"), echo=lambda line: None
    )
    with zipfile.ZipFile(made[0].path) as archive:
        assert archive.read("vllm/new.py") == b"test1\n"
        assert archive.read("vllm/envs.py") == _upstream("vllm/envs.py")
    receipt = json.loads(receipt_path(made[0].path).read_text(encoding="utf-8"))
    assert [patch["name"] for patch in receipt["series"]] == ["core/one.patch"]


def _upstream(name: str) -> bytes:
    with zipfile.ZipFile(download.fetch(PIN.wheels["x86_64"], project="vllm")) as archive:
        return archive.read(name)
