"""An OpenAI-compatible server that plays timelines and misbehaves on request.

It runs in a thread with an event loop of its own. `FakeServer.play` gives the steps of each answer;
`FakeServer.sent` keeps what went out and when, by the clock that the runner measures with.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

TEMPLATE_TOKENS = 7
# Seconds that a busy machine may add between the server's record of a moment and the client's, or
# to a sleep. What is played differs by more.
LATE = 0.15


@dataclass(frozen=True)
class Say:
    """After so many seconds, one chunk with a text of so many tokens."""

    after: float
    text: str = "word "
    tokens: int = 1
    channel: str = "content"


@dataclass(frozen=True)
class Call:
    """After so many seconds, one chunk with a part of a tool call."""

    after: float
    name: str
    arguments: str
    index: int = 0
    tokens: int = 5


@dataclass(frozen=True)
class Raw:
    """After so many seconds, these bytes, whatever they are."""

    after: float
    data: bytes


@dataclass(frozen=True)
class Hang:
    """Nothing more for so many seconds."""

    seconds: float = 3600.0


@dataclass(frozen=True)
class Disconnect:
    """End the connection in the middle."""

    after: float = 0.0


@dataclass(frozen=True)
class Status:
    """In place of a stream, an HTTP status."""

    code: int
    text: str = "broken"


@dataclass(frozen=True)
class End:
    """How the stream ends: its finish_reason, and whether usage and [DONE] are sent."""

    reason: str = "stop"
    usage: bool = True
    done: bool = True


Step = Say | Call | Raw | Hang | Disconnect | Status | End


def steady(
    first: float, gap: float, chunks: int, tokens: int = 1, text: str = "word "
) -> list[Step]:
    """A first chunk of one token, then chunks of equal size at equal gaps, then a good end."""
    return [Say(first, text), *(Say(gap, text, tokens) for _ in range(chunks - 1)), End()]


def words(messages: Sequence[dict[str, Any]]) -> int:
    """The fake tokenizer: a token for each word and each mark, and the template's."""
    text = " ".join(str(message.get("content") or "") for message in messages)
    return len(re.findall(r"\w+|[^\w\s]", text)) + TEMPLATE_TOKENS


@dataclass
class Sent:
    """One request: its body, when it came, and when which tokens went out."""

    body: dict[str, Any]
    came: float
    chunks: list[tuple[float, int]] = field(default_factory=list)
    ended: float | None = None

    @property
    def ttft(self) -> float:
        """Seconds from its coming to the first chunk: what was played, and the server's delay."""
        return self.chunks[0][0] - self.came

    @property
    def span(self) -> float:
        """Seconds from the first chunk to the last."""
        return self.chunks[-1][0] - self.chunks[0][0]

    @property
    def longest_stall(self) -> float:
        """The most seconds between two chunks."""
        times = [at for at, _ in self.chunks]
        return max(b - a for a, b in zip(times, times[1:], strict=False))


class FakeServer:
    """The server; use it as a context manager.

    ``play(body, number)`` returns the steps of the answer to the request of that number.
    ``continuous`` is whether usage comes with every chunk, as vLLM gives it when asked.
    ``strict`` refuses a request that has fields of vLLM's own, as others do.
    ``usage(prompt, completion)`` may change the counts; ``tokenize_delay`` makes the tokenizer
    slow, ``tokenize_status`` breaks it, ``count`` is another one. ``metrics_text`` replaces
    ``/metrics``.
    """

    def __init__(self, play: Callable[[dict[str, Any], int], Sequence[Step]] | None = None) -> None:
        self.play = play or (lambda body, number: steady(0.01, 0.002, 4))
        self.continuous = True
        self.strict = False
        self.max_model_len: int | None = 131072
        self.version: str | None = "0.22.1"
        self.usage: Callable[[int, int], tuple[int, int]] = lambda prompt, completion: (
            prompt,
            completion,
        )
        self.count: Callable[[Sequence[dict[str, Any]]], int] = words
        self.tokenize_delay = 0.0
        self.tokenize_status = 200
        self.healthy = True
        self.metrics_text: str | None = None
        self.prefix_cache = False
        self.sent: list[Sent] = []
        self.counters: Counter[str] = Counter()
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 28)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/version", self._version),
                web.get("/v1/models", self._models),
                web.get("/metrics", self._metrics),
                web.post("/tokenize", self._tokenize),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._completions),
            ]
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        await self._runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _version(self, request: web.Request) -> web.Response:
        if self.version is None:
            raise web.HTTPNotFound
        return web.json_response({"version": self.version})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"data": [{"id": "fake-model", "max_model_len": self.max_model_len}]}
        )

    async def _metrics(self, request: web.Request) -> web.Response:
        if self.metrics_text is not None:
            return web.Response(text=self.metrics_text)
        lines = [f'{name}_total{{engine="0"}} {value}' for name, value in self.counters.items()]
        lines.append(
            f'vllm:cache_config_info{{enable_prefix_caching="{self.prefix_cache}",engine="0"}} 1'
        )
        return web.Response(text="\n".join(lines) + "\n")

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        await asyncio.sleep(self.tokenize_delay)
        if self.tokenize_status != 200:
            return web.Response(status=self.tokenize_status)
        return web.json_response({"count": self.count(body["messages"])})

    async def _completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        reply = self.complete(body)
        return web.json_response(reply)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of ``/v1/completions``; tests replace it."""
        return {"choices": [{"text": "word", "finish_reason": "stop"}]}

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        sent = Sent(body, time.monotonic())
        self.sent.append(sent)
        steps = self.play(body, len(self.sent) - 1)
        self.counters["vllm:request_success"] += 1
        if self.strict and (unknown := foreign(body)):
            return web.Response(status=400, text=f"unknown: {', '.join(unknown)}")
        if steps and isinstance(steps[0], Status):
            return web.Response(status=steps[0].code, text=steps[0].text)
        if not body.get("stream"):
            return web.json_response(self._whole(body, steps))
        return await self._stream(request, sent, steps)

    def _whole(self, body: dict[str, Any], steps: Sequence[Step]) -> dict[str, Any]:
        said = [step for step in steps if isinstance(step, Say)]
        text = "".join(step.text for step in said)
        prompt, completion = self.count(body["messages"]), sum(step.tokens for step in said)
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "fake-model",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop",
                }
            ],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            },
        }

    async def _stream(
        self, request: web.Request, sent: Sent, steps: Sequence[Step]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        out, prompt = 0, self.count(sent.body["messages"])
        options = sent.body.get("stream_options") or {}
        due = time.monotonic()

        def usage() -> dict[str, Any]:
            told, answered = self.usage(prompt, out)
            return {
                "prompt_tokens": told,
                "completion_tokens": answered,
                "total_tokens": told + out,
            }

        async def event(choices: list[dict[str, Any]], counted: bool = False) -> None:
            data: dict[str, Any] = {"object": "chat.completion.chunk", "choices": choices}
            if counted or (self.continuous and options.get("continuous_usage_stats")):
                data["usage"] = usage()
            await response.write(f"data: {json.dumps(data)}\n\n".encode())

        await event([{"index": 0, "delta": {"role": "assistant", "content": ""}}])
        for step in steps:
            # Against the plan's time, not the last step's, so that delays do not add up.
            due += getattr(step, "after", 0.0) or getattr(step, "seconds", 0.0)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if isinstance(step, Say | Call):
                out += step.tokens
                sent.chunks.append((time.monotonic(), step.tokens))
                delta: dict[str, Any] = (
                    {step.channel: step.text} if isinstance(step, Say) else _call(step)
                )
                await event([{"index": 0, "delta": delta}])
            elif isinstance(step, Raw):
                await response.write(step.data)
            elif isinstance(step, Disconnect):
                assert request.transport is not None
                request.transport.abort()
                return response
            elif isinstance(step, End):
                await event([{"index": 0, "delta": {}, "finish_reason": step.reason}])
                if step.usage and options.get("include_usage"):
                    await event([], counted=True)
                if step.done:
                    await response.write(b"data: [DONE]\n\n")
        sent.ended = time.monotonic()
        return response


def foreign(body: dict[str, Any]) -> list[str]:
    """The fields of a request that the protocol of OpenAI does not have."""
    options = (body.get("stream_options") or {}).keys() - {"include_usage"}
    return sorted(options | (body.keys() & {"ignore_eos", "chat_template_kwargs"}))


def _call(step: Call) -> dict[str, Any]:
    function = {"name": step.name, "arguments": step.arguments}
    return {
        "tool_calls": [
            {
                "index": step.index,
                "id": f"call{step.index}",
                "type": "function",
                "function": function,
            }
        ]
    }
