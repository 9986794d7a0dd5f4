"""A server under test: how it is started, asked and looked into."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import openai
import psutil
from anyio.from_thread import start_blocking_portal

from gates import client, server
from gates.launch import launched
from tests.serving.options import HOST, MODEL_NAME, Serve

ROOT = Path(__file__).resolve().parents[2]
PLATFORM = ROOT / "tests" / "serving" / "platform"
WORKER = "tests.serving.scripted_worker.ScriptedWorker"
# Grammars allow no white space between tokens of JSON: random weights may like nothing better.
GRAMMARS = '{"backend": "xgrammar", "disable_any_whitespace": true}'
READY_S = 420.0
# A request that takes longer has failed.
ANSWER_S = 180.0
# Within this time a server whose process was killed has ended.
END_S = 60.0


@dataclass
class Served:
    """A server that answers.

    ``exact``: the same request gives the same answer, whatever runs beside it; so it is without a
    model. ``log`` is its output, ``pid`` its process; both are unknown of a server that plays.
    """

    url: str
    model: str = MODEL_NAME
    max_model_len: int = 131072
    exact: bool = False
    drafts: bool = True
    log: Path | None = None
    pid: int | None = None
    answer_s: float = ANSWER_S
    client: openai.OpenAI = field(init=False)

    def __post_init__(self) -> None:
        self.client = self.connect()

    def connect(self) -> openai.OpenAI:
        """A client with connections of its own; it asks once and does not try again."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", timeout=self.answer_s, max_retries=0
        )

    def metrics(self) -> dict[str, float]:
        """The server's counters and gauges, as ``gates/server.py`` names them."""

        async def read() -> dict[str, float]:
            async with client.http(self.url) as http:
                return await server.read_metrics(http) or {}

        return asyncio.run(read())

    def count(self, messages: list[dict[str, object]], **template: object) -> int | None:
        """The prompt's tokens by the server's own count."""

        async def ask() -> int | None:
            async with client.http(self.url) as http:
                return await server.count_tokens(
                    http, server.Server(self.url, self.model), messages, **template
                )

        return asyncio.run(ask())

    def processes(self) -> list[psutil.Process]:
        """The server's process and all below it."""
        assert self.pid is not None
        try:
            top = psutil.Process(self.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def process(self, title: str) -> psutil.Process:
        """The one process below the server's that calls itself so, as ``VLLM::EngineCore``."""
        found = [one for one in self.processes() if title in " ".join(_command(one))]
        assert found, f"no process {title} among {[_command(one) for one in self.processes()]}"
        return found[0]

    def said(self) -> str:
        """Its whole log."""
        assert self.log is not None
        return self.log.read_text(encoding="utf-8", errors="replace")


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Whether it comes to hold before so many seconds have passed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.1)
    return holds()


def port_is_free(port: int) -> bool:
    """Whether nothing listens there."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((HOST, port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def serving(serve: Serve, environment: dict[str, str], log: Path, exact: bool) -> Iterator[Served]:
    """``vllm serve`` while the block runs, started and stopped as the validation suite does.

    Raises:
        StackError: It was not ready in time; the end of its log is in the message.
    """
    command = ["env", *(f"{name}={value}" for name, value in environment.items()), *serve.command()]
    mine = psutil.Process()
    before = {child.pid for child in mine.children()}

    async def run(http):
        async with launched(command, http, log, READY_S, print):
            yield

    with start_blocking_portal() as portal, contextlib.ExitStack() as held:
        http = client.http(serve.url)
        held.enter_context(portal.wrap_async_context_manager(http))
        manager = contextlib.asynccontextmanager(run)(http)
        held.enter_context(portal.wrap_async_context_manager(manager))
        (pid,) = [child.pid for child in mine.children() if child.pid not in before]
        yield Served(
            serve.url,
            max_model_len=serve.max_model_len,
            exact=exact,
            drafts=serve.mtp > 0,
            log=log,
            pid=pid,
        )


def scripted(model: Path, port: int, tp: int = 1) -> tuple[Serve, dict[str, str]]:
    """A server without a GPU and without a model: its options and its environment."""
    serve = Serve(
        model,
        port,
        tp=tp,
        max_num_seqs=16,
        extra=("--worker-cls", WORKER, "--structured-outputs-config", GRAMMARS),
    )
    paths = [str(PLATFORM), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return serve, {
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        # Several ranks are spawned, as `vllm serve` spawns them: forked ones share their pipes, and
        # do not notice each other's end.
        "SCRIPTED_START": "spawn" if tp > 1 else "fork",
    }
