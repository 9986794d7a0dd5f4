"""Downloads: resumed, retried and checked, and nothing wrong is ever left under the right name."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stack import download, index
from stack.download import fetch, fetch_sdist
from stack.errors import StackError
from stack.pin import ROOT, Artifact, load_pin

NAME = "vllm-9.9.9.tar.gz"


@pytest.fixture
def content() -> bytes:
    # Three chunks and a bit, so that a file is written in several pieces.
    return random.Random(20261123).randbytes(3 * download.CHUNK + 4321)


def dropped_at(count: int):
    """Promise everything from the asked offset on, send ``count`` bytes, close the connection."""

    def answer(handler, content: bytes) -> None:
        start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        body = content[start:]
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        status, extra = (206, {"Content_Range": span}) if start else (200, {})
        handler.send(status, body[:count], length=len(body), **extra)
        handler.close_connection = True

    return answer


def status(code: int, **headers):
    return lambda handler, content: handler.send(code, b"no", **headers)


def left_in(folder: Path) -> set[str]:
    """What a later run could read: the lock says nothing about the content."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_a_download_is_kept_and_not_asked_for_again(package_index, cache, content):
    artifact = package_index.add(NAME, content)
    path = fetch(artifact, project="vllm")
    assert path == cache / NAME and path.read_bytes() == content
    asked = len(package_index.asked)
    assert fetch(artifact, project="vllm") == path
    assert len(package_index.asked) == asked
    assert left_in(cache) == {NAME}


def test_a_file_put_into_the_cache_by_hand_is_used(package_index, cache, content):
    cache.mkdir()
    (cache / NAME).write_bytes(content)
    artifact = Artifact(NAME, len(content), hashlib.sha256(content).hexdigest())
    assert fetch(artifact, project="vllm") == cache / NAME
    assert package_index.asked == []


@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b"x" + b[1:], lambda b: b""])
def test_a_wrong_file_in_the_cache_is_replaced(package_index, cache, content, spoil, capsys):
    artifact = package_index.add(NAME, content)
    cache.mkdir()
    (cache / NAME).write_bytes(spoil(content))
    assert fetch(artifact, project="vllm").read_bytes() == content
    assert "removing" in capsys.readouterr().err


def test_a_dropped_connection_is_resumed_from_where_it_stopped(package_index, cache, content):
    artifact = package_index.add(NAME, content)
    cut = 2 * download.CHUNK
    package_index.answers = [dropped_at(cut), dropped_at(100)]
    assert fetch(artifact, project="vllm").read_bytes() == content
    first, second, third = package_index.ranges
    assert first is None
    # What had come was not asked for again; how much of the cut piece is kept is urllib3's matter.
    assert 0 < int(second[6:-1]) <= cut
    assert int(second[6:-1]) <= int(third[6:-1]) <= cut + 100


def test_progress_begins_the_count_of_tries_anew(package_index, cache, content):
    artifact = package_index.add(NAME, content)
    piece = len(content) // (2 * download.ATTEMPTS)
    package_index.answers = [dropped_at(piece)] * (2 * download.ATTEMPTS - 1)
    assert fetch(artifact, project="vllm").read_bytes() == content


def test_the_next_run_goes_on_with_what_an_interrupted_one_left(package_index, cache, content):
    artifact = package_index.add(NAME, content)
    cut = download.CHUNK

    cache.mkdir()
    (cache / f"{NAME}.{artifact.sha256[:16]}.part").write_bytes(content[:cut])
    assert fetch(artifact, project="vllm").read_bytes() == content
    assert package_index.ranges == [f"bytes={cut}-"]
    assert left_in(cache) == {NAME}


def test_a_server_that_ignores_ranges_is_read_from_the_start(package_index, cache, content):
    artifact = package_index.add(NAME, content)
    package_index.answers = [
        dropped_at(download.CHUNK),
        lambda handler, content: handler.send(200, content),
    ]
    assert fetch(artifact, project="vllm").read_bytes() == content


@pytest.mark.parametrize(
    "span", ["bytes 0-9/{size}", "bytes {cut}-{last}/123", "", "bytes */{size}"]
)
def test_a_range_other_than_asked_for_is_not_appended(package_index, cache, content, span):
    artifact = package_index.add(NAME, content)
    cut = download.CHUNK
    told = span.format(size=len(content), cut=cut, last=len(content) - 1)
    package_index.answers = [
        lambda handler, content: handler.send(206, content[cut:], Content_Range=told)
    ]
    cache.mkdir()
    (cache / f"{NAME}.{artifact.sha256[:16]}.part").write_bytes(content[:cut])
    assert fetch(artifact, project="vllm").read_bytes() == content
    assert package_index.ranges == [f"bytes={cut}-", None]


@pytest.mark.parametrize("garbage", [1000, None, 10_000_000])
def test_a_spoilt_part_is_thrown_away(package_index, cache, content, garbage):
    artifact = package_index.add(NAME, content)
    cache.mkdir()
    size = len(content) if garbage is None else garbage
    (cache / f"{NAME}.{artifact.sha256[:16]}.part").write_bytes(bytes(size))
    assert fetch(artifact, project="vllm").read_bytes() == content


def test_wrong_bytes_leave_nothing(package_index, cache, content):
    artifact = package_index.add(NAME, content)
    package_index.files[NAME] = wrong = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(StackError) as error:
        fetch(artifact, project="vllm")
    assert artifact.sha256 in error.value.message
    assert hashlib.sha256(wrong).hexdigest() in error.value.message
    assert NAME in error.value.message
    assert left_in(cache) == set()
    package_index.files[NAME] = content
    assert fetch(artifact, project="vllm").read_bytes() == content
    assert package_index.ranges == [None, None]


@pytest.mark.parametrize("promise_it", [True, False])
@pytest.mark.parametrize("change", [lambda b: b[:-5], lambda b: b + b"more"])
def test_another_length_leaves_nothing(package_index, cache, content, change, promise_it):
    artifact = package_index.add(NAME, content)

    def answer(handler, content):
        if promise_it:
            return handler.send(200, change(content))
        handler.send_response(200)
        handler.end_headers()  # no length: the end of the connection is the end of the file
        handler.wfile.write(change(content))
        handler.close_connection = True

    package_index.answers = [answer] * 20
    with pytest.raises(StackError) as error:
        fetch(artifact, project="vllm")
    assert NAME in error.value.message
    assert NAME not in left_in(cache)


def test_a_busy_server_is_asked_again(package_index, cache, content):
    artifact = package_index.add(NAME, content)
    package_index.list_answers = [status(503)]
    package_index.answers = [status(500), status(502), status(429, Retry_After="0")]
    assert fetch(artifact, project="vllm").read_bytes() == content


def test_retry_after_is_obeyed(package_index, cache, content, monkeypatch):
    artifact = package_index.add(NAME, content)
    slept = []
    monkeypatch.setattr(download.time, "sleep", slept.append)
    package_index.answers = [status(503, Retry_After="7")]
    fetch(artifact, project="vllm")
    assert slept == [7.0]


@pytest.mark.parametrize("where", ["answers", "list_answers"])
def test_a_server_that_stays_broken_is_one_error(package_index, cache, content, where):
    artifact = package_index.add(NAME, content)
    setattr(package_index, where, [status(500)] * 50)
    with pytest.raises(StackError, match="500") as error:
        fetch(artifact, project="vllm")
    assert NAME in error.value.message and error.value.hint
    assert len(getattr(package_index, where)) == 50 - download.ATTEMPTS


@pytest.mark.parametrize("code", [403, 404, 410])
@pytest.mark.parametrize("where", ["answers", "list_answers"])
def test_a_refusal_is_not_asked_again(package_index, cache, content, code, where):
    artifact = package_index.add(NAME, content)
    setattr(package_index, where, [status(code)] * 3)
    with pytest.raises(StackError, match=r"404|40[13]|410|no project") as error:
        fetch(artifact, project="vllm")
    assert error.value.hint
    assert len(getattr(package_index, where)) == 2


def test_a_file_that_the_index_does_not_list(package_index, cache):
    with pytest.raises(StackError, match=f"{NAME} is not on the package index"):
        fetch(Artifact(NAME, 3, "0" * 64), project="vllm")


def test_an_index_that_answers_with_something_else(package_index, cache):
    package_index.list_answers = [
        lambda handler, body: handler.send(200, b"%PDF", Content_Type="application/pdf")
    ]
    with pytest.raises(StackError, match="gave no list of files"):
        fetch(Artifact(NAME, 3, "0" * 64), project="vllm")


def test_no_network(cache, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("PIP_INDEX_URL", f"http://user:secret@127.0.0.1:{port}/simple/")
    monkeypatch.setattr(download, "PAUSE", 0.0)
    with pytest.raises(StackError, match="no connection") as error:
        fetch(Artifact(NAME, 3, "0" * 64), project="vllm")
    assert "network" in error.value.hint
    assert "secret" not in error.value.message + error.value.hint
    assert "\n" not in error.value.message


def test_a_certificate_that_is_not_trusted(cache, monkeypatch, package_index):
    # The index speaks plain HTTP: a TLS handshake with it fails as any other would.
    monkeypatch.setenv("PIP_INDEX_URL", package_index.url.replace("http:", "https:") + "/simple/")
    with pytest.raises(StackError, match="certificate was not accepted") as error:
        fetch(Artifact(NAME, 3, "0" * 64), project="vllm")
    assert "PIP_CERT" in error.value.hint


def test_an_index_that_is_not_http(cache, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "file:///srv/simple")
    with pytest.raises(StackError, match="expected an http or https address"):
        fetch(Artifact(NAME, 3, "0" * 64), project="vllm")


def test_pips_own_configuration_names_the_index(monkeypatch):
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.setattr(index, "pip_config", lambda: {"global.index-url": "https://mirror/simple"})
    assert index.index_url() == "https://mirror/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://nearer/simple")
    assert index.index_url() == "https://nearer/simple"


def test_pip_config_is_read_from_pip(monkeypatch, tmp_path):
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = https://mirror.example/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    index.pip_config.cache_clear()
    try:
        assert index.pip_config()["global.index-url"] == "https://mirror.example/simple"
    finally:
        index.pip_config.cache_clear()


def test_disk_full_before_and_while_writing(package_index, cache, content, monkeypatch):
    artifact = package_index.add(NAME, content)
    real = download.shutil.disk_usage
    with monkeypatch.context() as patched:
        patched.setattr(
            download.shutil, "disk_usage", lambda path: real(path)._replace(free=len(content) - 1)
        )
        with pytest.raises(StackError, match="no space left") as error:
            fetch(artifact, project="vllm")
    assert str(cache) in error.value.message and download.CACHE_ENV in error.value.hint

    def full(self, done):
        if done > download.CHUNK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(download._Progress, "at", full)
        with pytest.raises(StackError, match="no space left"):
            fetch(artifact, project="vllm")
    assert NAME not in left_in(cache)
    assert fetch(artifact, project="vllm").read_bytes() == content


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, which wants root")
def test_a_disk_that_is_really_full(package_index, tmp_path, content, monkeypatch):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={len(content) // 2}", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        monkeypatch.setenv(download.CACHE_ENV, str(folder))
        artifact = package_index.add(NAME, content)
        with pytest.raises(StackError, match="no space left"):
            fetch(artifact, project="vllm")
        # A file system that cannot say how much is free fails at the write itself.
        real = download.shutil.disk_usage
        monkeypatch.setattr(
            download.shutil, "disk_usage", lambda path: real(path)._replace(free=1 << 40)
        )
        with pytest.raises(StackError, match="no space left"):
            fetch(artifact, project="vllm")
        assert NAME not in left_in(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_cache_that_is_a_file(package_index, cache, content):
    cache.write_text("not a folder")
    with pytest.raises(StackError, match=str(cache)):
        fetch(package_index.add(NAME, content), project="vllm")


def test_a_cache_that_cannot_be_written(package_index, cache, content, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(cache))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(StackError, match="cannot be written: Permission denied") as error:
        fetch(package_index.add(NAME, content), project="vllm")
    assert download.CACHE_ENV in error.value.hint


def test_two_runs_at_once_do_not_spoil_each_other(package_index, cache, content):
    artifact = package_index.add(NAME, content)
    program = textwrap.dedent(
        f"""
        from stack.download import fetch
        from stack.pin import Artifact
        print(fetch({artifact!r}, project="vllm"))
        """
    )
    command = [sys.executable, "-c", program]
    runs = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    for run in runs:
        out, err = run.communicate(timeout=60)
        assert run.returncode == 0, err.decode()
        assert out.decode().strip() == str(cache / NAME)
    assert (cache / NAME).read_bytes() == content
    assert package_index.ranges == [None], "one run downloads, the others wait for it"


def test_sdists_of_listed_releases_use_the_pinned_digest(package_index, cache):
    package_index.add("vllm-0.23.0.tar.gz", b"not the release")
    with pytest.raises(StackError, match="not the pinned file"):
        fetch_sdist("0.23.0")


def test_other_sdists_use_the_digest_of_the_index_and_say_so(package_index, cache, content, capsys):
    package_index.add(NAME, content)
    assert fetch_sdist("9.9.9").read_bytes() == content
    assert "not pinned" in capsys.readouterr().err


def test_a_release_that_is_not_there(package_index, cache, content):
    package_index.add(NAME, content)
    with pytest.raises(StackError, match="no sdist of vllm 9.9.10") as error:
        fetch_sdist("9.9.10")
    assert "9.9.9" in error.value.hint


def test_the_pin_and_the_list_of_releases_agree():
    pin = load_pin()
    assert download.releases()[pin.version] == pin.sdist
