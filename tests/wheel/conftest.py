"""A package index that misbehaves as told, a cache for each test, and a small "upstream" wheel."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stack import download, index
from stack.pin import Artifact

Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


@dataclass
class Index:
    """Files by name, what was asked, and how to answer the next requests for a file."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    # Answers for the next requests of files, one each; well-behaved ones when they run out.
    answers: list[Answer] = field(default_factory=list)
    list_answers: list[Answer] = field(default_factory=list)

    def add(self, name: str, content: bytes) -> Artifact:
        self.files[name] = content
        return Artifact(name, len(content), hashlib.sha256(content).hexdigest())

    @property
    def ranges(self) -> list[str | None]:
        """The Range header of each request for a file."""
        return [told for path, told in self.asked if path.startswith("/files/")]


def well_behaved(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    told = handler.headers.get("Range")
    if told is None:
        return handler.send(200, content)
    start = int(told.removeprefix("bytes=").removesuffix("-"))
    span = f"bytes {start}-{len(content) - 1}/{len(content)}"
    return handler.send(206, content[start:], Content_Range=span)


@pytest.fixture
def package_index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """A local package index, set as pip's; downloads from it do not pause between tries."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append((self.path, self.headers.get("Range")))
            name = self.path.rpartition("/")[2]
            if self.path.startswith("/simple/"):
                files = [
                    {
                        "filename": name,
                        "url": f"{served.url}/files/{name}",
                        "hashes": {"sha256": hashlib.sha256(content).hexdigest()},
                        "size": len(content),
                    }
                    for name, content in served.files.items()
                ]
                page = {"meta": {"api-version": "1.1"}, "name": "vllm", "versions": []}
                body = json.dumps(page | {"files": files}).encode()
                if served.list_answers:
                    return served.list_answers.pop(0)(self, body)
                if not self.path.startswith("/simple/vllm"):
                    return self.send(404, b"")
                kind = "application/vnd.pypi.simple.v1+json"
                return self.send(200, body, Content_Type=kind)
            answer = served.answers.pop(0) if served.answers else well_behaved
            return answer(self, served.files[name])

        def send(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
            """Answer with ``body``; ``length`` is what is promised, the body's own by default."""
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Index(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"{served.url}/simple/")
    monkeypatch.setattr(download, "PAUSE", 0.0)
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """An empty download cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(download.CACHE_ENV, str(folder))
    index.pip_config.cache_clear()
    return folder


METADATA = """\
Metadata-Version: 2.4
Name: vllm
Version: 1.2.3
Summary: A stand-in for vLLM
License-Expression: Apache-2.0
Requires-Python: <3.15,>=3.10
Description-Content-Type: text/markdown
License-File: LICENSE
Requires-Dist: regex; python_version >= "3"
Requires-Dist: cachetools
Provides-Extra: bench
Requires-Dist: pandas; extra == "bench"
Dynamic: license-file

# Easy, fast serving — for everyone

Version: 1.2.3 is also said here.
"""
VERSION_FILE = """\
__version__ = version = '1.2.3'
__version_tuple__ = version_tuple = (1, 2, 3)

__commit_id__ = commit_id = 'g0123456789'
"""
ENTRY_POINTS = "[console_scripts]\nvllm = vllm.cli:main\n"


@pytest.fixture
def upstream_files() -> dict[str, tuple[bytes, int]]:
    """Content and mode of a small wheel of "vllm" 1.2.3, RECORD apart."""
    text = b"# a line that compresses well\n" * 300
    info = "vllm-1.2.3.dist-info"
    return {
        "vllm/_C.abi3.so": (random.Random(7).randbytes(70_000), 0o100755),
        "vllm/__init__.py": (b"from ._version import __version__\n" + text, 0o100644),
        "vllm/_version.py": (VERSION_FILE.encode(), 0o100644),
        "vllm/a.py": (b"A = 1\n" + text, 0o100644),
        "vllm/b.py": (b"B = 1\n" + text, 0o100664),
        "vllm/cli.py": (b"def main():\n    print('hello')\n", 0o100644),
        "vllm/configs/größe,1.json": (b"{}\n", 0o100644),
        "vllm/run.sh": (b"#!/bin/sh\n", 0o100755),
        "vllm/utils/native.cpp": (b"int main() {}\n", 0o100644),
        f"{info}/licenses/LICENSE": (b"upstream's licence\n", 0o100644),
        f"{info}/METADATA": (METADATA.encode(), 0o100644),
        f"{info}/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: setuptools (80)\nRoot-Is-Purelib: false\n"
            b"Tag: cp38-abi3-linux_x86_64\n\n",
            0o100644,
        ),
        f"{info}/entry_points.txt": (ENTRY_POINTS.encode(), 0o100644),
        f"{info}/top_level.txt": (b"vllm\n", 0o100644),
    }


@pytest.fixture
def make_wheel(tmp_path) -> Callable[..., Path]:
    """Write files as a wheel of "vllm" 1.2.3, compressed, with the RECORD that belongs to them."""

    def make(
        files: dict[str, tuple[bytes, int]],
        tag: str = "cp38-abi3-manylinux_2_28_x86_64",
        version: str = "1.2.3",
    ) -> Path:
        path = tmp_path / "upstream" / f"vllm-{version}-{tag}.whl"
        path.parent.mkdir(exist_ok=True)
        record = "".join(
            ('"{}"' if "," in name else "{}").format(name)
            + f",sha256={b64(hashlib.sha256(data).digest())},{len(data)}\n"
            for name, (data, _) in files.items()
        )
        name = f"vllm-{version}.dist-info/RECORD"
        files = files | {name: ((record + f"{name},,\n").encode(), 0o100664)}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, (data, mode) in files.items():
                info = zipfile.ZipInfo(name, (2026, 6, 4, 21, 44, 30))
                info.external_attr = mode << 16
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, data)
        return path

    return make


def b64(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


@pytest.fixture
def other_python() -> Callable[[str], list[str]]:
    """A command that runs a given Python, with what the assembly needs of packages."""

    def find(version: str) -> list[str]:
        import packaging

        site = str(Path(packaging.__file__).parent.parent)
        for path in (
            shutil.which(f"python{version}"),
            *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
        ):
            if path is None:
                continue
            command = [str(path), "-c", "import sys; print(sys.version_info[:2])"]
            shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            if shown.strip() == str(tuple(int(part) for part in version.split("."))):
                return ["env", f"SITE={site}", str(path)]
        pytest.skip(f"no Python {version} here")

    return find
