"""Send one request and take down its stream; every fault becomes a word in the answer.

Nothing here raises for what a server does: a refused connection, a stall, a broken stream and
garbled events end in ``Answer.fault``, with the figures up to there kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anyio
import httpx
from httpx_sse import SSEError, aconnect_sse

from gates.answer import Answer, Chunk
from gates.spec import Timeouts

Body = dict[str, Any]
CONNECT_S = 10.0


def bare(url: str) -> str:
    """A server's address without ``/v1``, which many name with it; every path here begins there."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def http(base_url: str, api_key: str | None = None) -> httpx.AsyncClient:
    """The connection pool of a run: no limit of its own, no proxy, no redirect."""
    return httpx.AsyncClient(
        base_url=base_url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx.Timeout(None, connect=CONNECT_S),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,
    )


async def stream(
    client: httpx.AsyncClient,
    body: Body,
    timeouts: Timeouts,
    path: str = "/v1/chat/completions",
    on_chunk: Callable[[Answer], None] | None = None,
) -> Answer:
    """Send a streaming request and return what arrived.

    Args:
        client: From `http`.
        body: The request; ``stream`` and ``stream_options`` are the caller's.
        timeouts: When to give up. A given-up request is closed, so that the server ends it too.
        path: ``/v1/chat/completions`` or ``/v1/completions``.
        on_chunk: Called after each arrival, with the answer so far.
    """
    # The event loop's clock, so that deadlines and arrivals are of one clock.
    answer = Answer(sent_at=anyio.current_time())
    total = answer.sent_at + timeouts.total_s
    waiting, seen = "first_token", 0
    with anyio.CancelScope(deadline=min(total, answer.sent_at + timeouts.first_token_s)) as scope:
        try:
            async with aconnect_sse(client, "POST", path, json=body) as source:
                if source.response.status_code != httpx.codes.OK:
                    await source.response.aread()
                    said = source.response.text
                    answer.fail("http", f"{source.response.status_code}: {said}")
                else:
                    reader = _Reader(answer)
                    async for event in source.aiter_sse():
                        if reader.take(event.data, anyio.current_time() - answer.sent_at):
                            break
                        if len(answer.chunks) > seen:
                            seen = len(answer.chunks)
                            waiting = "stall"
                            last = answer.sent_at + answer.chunks[-1].at
                            scope.deadline = min(total, last + timeouts.stall_s)
                            if on_chunk:
                                on_chunk(answer)
                    reader.close(body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            answer.fail("refused", _said(error))
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
            answer.fail("disconnected", _said(error))
        except (SSEError, UnicodeDecodeError, httpx.DecodingError) as error:
            answer.fail("garbled", _said(error))
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ValueError) as error:
            answer.fail("client", _said(error))
    answer.ended = anyio.current_time() - answer.sent_at
    if scope.cancelled_caught:
        fault = "total" if anyio.current_time() >= total else waiting
        answer.fail(fault, f"given up after {answer.ended:.1f} s")
    return answer


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().rstrip(":")


class _Reader:
    """Puts the events of one stream into an answer."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.counted = 0
        self.has_usage = False
        self.done = False

    def take(self, data: str, at: float) -> bool:
        """Take down one event; true at the closing one."""
        if data.strip() == "[DONE]":
            self.done = True
            return True
        if not data:
            return False
        try:
            event = json.loads(data)
        except ValueError:
            self.answer.fail("garbled", data)
            return False
        if not isinstance(event, dict):
            self.answer.fail("garbled", data)
            return False
        if error := event.get("error"):
            self.answer.fail("server_error", json.dumps(error))
            return False
        try:
            self._take(event, at)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            self.answer.fail("garbled", f"{_said(error)}: {data}")
        return False

    def _take(self, event: dict[str, Any], at: float) -> None:
        brought = False
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text = delta.get("content") or choice.get("text") or ""
            # vLLM says `reasoning`, others and older releases `reasoning_content`.
            reasoning = delta.get("reasoning") or delta.get("reasoning_content") or ""
            calls = delta.get("tool_calls") or ()
            self.answer.text += text
            self.answer.reasoning += reasoning
            for call in calls:
                self._call(call)
            self.answer.finish_reason = choice.get("finish_reason") or self.answer.finish_reason
            brought = brought or bool(text or reasoning or calls)
        # Counts by chunk are known where every event has its usage. Where only the last one has,
        # it is the whole answer's and no arrival.
        continuous = self.has_usage or not self.answer.chunks
        self.has_usage = self.has_usage or bool(event.get("usage"))
        tokens = self._usage(event.get("usage"))
        known = tokens if event.get("usage") and continuous else None
        if brought or (known and event.get("choices")):
            self.answer.chunks.append(Chunk(at, known))

    def _call(self, call: dict[str, Any]) -> None:
        index = call.get("index") or 0
        while len(self.answer.tool_calls) <= index:
            self.answer.tool_calls.append({"id": "", "name": "", "arguments": ""})
        kept, function = self.answer.tool_calls[index], call.get("function") or {}
        kept["id"] = call.get("id") or kept["id"]
        kept["name"] += function.get("name") or ""
        kept["arguments"] += function.get("arguments") or ""

    def _usage(self, usage: dict[str, Any] | None) -> int:
        """Take down the counts so far, and return how many tokens this event added."""
        if not usage:
            return 0
        completion = usage["completion_tokens"]
        self.answer.prompt_tokens = usage["prompt_tokens"]
        self.answer.completion_tokens = completion
        details = usage.get("prompt_tokens_details") or {}
        if details.get("cached_tokens") is not None:
            self.answer.cached_tokens = details["cached_tokens"]
        added = completion - self.counted
        self.counted = completion
        if added < 0:
            self.answer.fail("usage", f"completion_tokens went down by {-added}")
        return added

    def close(self, body: Body) -> None:
        """Judge the whole: its end, and whether the counts can be true."""
        answer = self.answer
        if not self.done and not answer.finish_reason:
            answer.fail("cut_off", "the stream ended without [DONE] and without a finish_reason")
        if not answer.chunks:
            answer.fail("empty", "the stream held no token")
            return
        count, limit = answer.completion_tokens, body.get("max_tokens")
        if count is None or answer.prompt_tokens is None:
            answer.fail("usage", "the stream held no token counts")
        elif count < 1 or answer.prompt_tokens < 1:
            answer.fail("usage", f"{answer.prompt_tokens} prompt and {count} completion tokens")
        elif limit is not None and count > limit:
            answer.fail("usage", f"{count} completion tokens, more than max_tokens={limit}")
        placed = [chunk.tokens for chunk in answer.chunks]
        if all(tokens is not None for tokens in placed) and not answer.fault:
            rest = (count or 0) - sum(tokens or 0 for tokens in placed)
            if rest < 0:
                answer.fail("usage", f"the chunks held {-rest} tokens more than the final count")
            elif rest:
                # The server did not count all of them by chunk: the total stands, the parts do not.
                for chunk in answer.chunks:
                    chunk.tokens = None
