"""The wheel of the pinned release, made for real: both architectures, from this checkout."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

import jsonschema
import pytest

from stack import download, wheel
from stack.pin import ARCHITECTURES, ROOT, load_pin
from stack.wheel_receipt import receipt_path

pytestmark = [pytest.mark.network, pytest.mark.slow]
PIN = load_pin()
INFO = f"vllm-{PIN.local_version}.dist-info"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The wheels of both architectures, by architecture."""
    wheels = wheel.build(ARCHITECTURES, tmp_path_factory.mktemp("dist"), echo=lambda line: None)
    return dict(zip(ARCHITECTURES, wheels, strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_second_build_gives_the_same_bytes(made, tmp_path, arch):
    umask = "import os; os.umask(0o077); "
    program = umask + "from stack.__main__ import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "wheel", "--arch", arch, "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "TZ": "Asia/Kathmandu", "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.name == made[arch].path.name
    assert download.sha256_of(path) == made[arch].sha256 == download.sha256_of(made[arch].path)
    receipts = [json.loads(receipt_path(p).read_text()) for p in (path, made[arch].path)]
    for receipt in receipts:
        receipt.pop("made")
        # Others may edit the checkout while the test runs.
        receipt.pop("repository")
    assert receipts[0] == receipts[1]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_receipt_is_valid_and_true(made, arch):
    receipt = json.loads(receipt_path(made[arch].path).read_text(encoding="utf-8"))
    schema = json.loads((ROOT / "stack" / "receipt.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(receipt)
    told = receipt["wheel"]
    assert told["sha256"] == download.sha256_of(made[arch].path)
    assert told["size"] == made[arch].path.stat().st_size
    assert receipt["binaries"]["sha256"] == PIN.wheels[arch].sha256
    for patch in receipt["series"]:
        content = (ROOT / "patches" / patch["name"]).read_bytes()
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
