"""Which releases the index has, and which of its files belong to one."""

from __future__ import annotations

import datetime
from types import SimpleNamespace

import pytest
import requests

from stack import index, release_index
from stack.errors import StackError
from stack.pin import Artifact

DAY = datetime.datetime(2026, 6, 13, 23, 59, tzinfo=datetime.timezone.utc)


def package(filename: str, version: str, **more) -> SimpleNamespace:
    kind = "sdist" if filename.endswith(".tar.gz") else "wheel"
    return SimpleNamespace(
        filename=filename,
        version=version,
        package_type=kind,
        is_yanked=more.get("yanked", False),
        size=more.get("size", 10),
        digests=more.get("digests", {"sha256": "a" * 64}),
        upload_time=more.get("upload_time", DAY),
    )


def sdist(version: str, **more) -> SimpleNamespace:
    return package(f"vllm-{version}.tar.gz", version, **more)


def wheel(version: str, arch: str, build: str = "", **more) -> SimpleNamespace:
    tag = f"-{build}" if build else ""
    name = f"vllm-{version}{tag}-cp38-abi3-manylinux_2_28_{arch}.whl"
    return package(name, version, **more)


@pytest.fixture
def listed(monkeypatch):
    """Let the index list the given files."""

    def set_to(*packages):
        monkeypatch.setattr(index, "listed", lambda project, http: list(packages))

    return set_to


def test_the_newest_is_by_number_not_by_letter_and_no_candidate(listed):
    versions = ["0.9.2", "0.33.0", "0.4.0", "0.100.0rc1", "0.34.0"]
    listed(*(sdist(v, yanked=v == "0.34.0") for v in versions), wheel("0.35.0", "x86_64"))
    assert release_index.newest("vllm") == "0.33.0"


def test_no_release_at_all(listed):
    listed(wheel("1.0.0", "x86_64"))
    with pytest.raises(StackError, match="no sdist of vllm"):
        release_index.newest("vllm")


@pytest.mark.parametrize(
    "version", ["", "v1.0.0", "1", "1.0.0rc1", "1.0.0 ", "../1.0.0", "1.0.0\n"]
)
def test_what_is_no_release(version, listed):
    listed(sdist("1.0.0"))
    with pytest.raises(StackError, match="is no release"):
        release_index.require("vllm", version)


def test_a_known_release_is_not_asked_for(monkeypatch):
    def refuse(project, http):
        raise AssertionError("the index was asked")

    monkeypatch.setattr(index, "listed", refuse)
    release_index.require("vllm", "1.2.3", known=["1.2.3"])


def test_no_network_is_one_clear_line(monkeypatch):
    def refuse(project, http):
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(index, "listed", refuse)
    with pytest.raises(StackError, match="was not reached: ConnectionError"):
        release_index.require("vllm", "1.2.3")


def test_nearest_are_two_on_either_side():
    versions = ["0.8.0", "0.9.0", "0.10.0", "0.11.0", "0.12.0"]
    assert release_index.nearest("0.10.5", versions) == ["0.9.0", "0.10.0", "0.11.0", "0.12.0"]
    assert release_index.nearest("0.1.0", versions) == ["0.8.0", "0.9.0"]
    assert release_index.later("0.10.0", "0.9.9") and not release_index.later("0.9.9", "0.9.9")


def test_the_files_of_a_release(listed):
    listed(
        sdist("1.0.0", size=7),
        sdist("1.0.1"),
        wheel("1.0.0", "aarch64", size=8),
        wheel("1.0.0", "x86_64", size=9),
        wheel("1.0.0", "x86_64", build="10", size=11),
        wheel("1.0.0", "x86_64", build="9", size=10),
        wheel("1.0.0", "x86_64", build="12", size=12, yanked=True),
        package("vllm-1.0.0-cp38-abi3-macosx_11_0_x86_64.whl", "1.0.0"),
    )
    found = release_index.release("vllm", "1.0.0")
    assert found.date == datetime.date(2026, 6, 13)
    assert found.sdist == Artifact("vllm-1.0.0.tar.gz", 7, "a" * 64)
    assert found.wheels["aarch64"].filename == "vllm-1.0.0-cp38-abi3-manylinux_2_28_aarch64.whl"
    assert found.wheels["x86_64"].size == 11


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        ([], "no sdist of vllm 1.0.0"),
        ([sdist("1.0.0"), wheel("1.0.0", "x86_64")], "no aarch64 wheel of vllm 1.0.0"),
        (
            [sdist("1.0.0"), wheel("1.0.0", "aarch64"), wheel("1.0.0", "x86_64", digests={})],
            "no size or no SHA-256 for vllm-1.0.0-cp38-abi3-manylinux_2_28_x86_64.whl",
        ),
        (
            [
                sdist("1.0.0", upload_time=None),
                wheel("1.0.0", "x86_64"),
                wheel("1.0.0", "aarch64"),
            ],
            "does not say when",
        ),
    ],
)
def test_a_release_that_is_not_whole(listed, packages, message):
    listed(*packages)
    with pytest.raises(StackError, match=message):
        release_index.release("vllm", "1.0.0")
