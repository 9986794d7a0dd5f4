"""A package index on this machine that misbehaves as told, and a cache of its own for each test."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
