"""What one call measures on a running server, cell by cell, within a budget of time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.engine import startup, trace
from benchmarks.engine.rows import Rows
from gates import client, figures, server
from gates.answer import Answer
from gates.spec import Timeouts

# The figures of `gates/figures.py` that a row keeps; times in seconds.
KEPT = (
    *("requests", "failures", "prompt_tokens_mean", "completion_tokens_mean", "cached_share"),
    *("ttft_mean", "ttft_median", "ttft_max", "tpot_mean", "tpot_median"),
    *("itl_p50", "itl_p99", "e2e_mean", "output_tok_s", "input_tok_s", "tokens_per_chunk"),
)
# No token id below this is drawn: specials and bytes.
FIRST_WORD = 320
FIRST_PROMPT, FIRST_TOKENS = 256, 16
# A traced answer, and the seconds and chunks of it that are traced at least, far from its end.
PROFILE_TOKENS, PROFILE_S, PROFILE_CHUNKS = 1024, 0.1, 4


@dataclass(frozen=True)
class Plan:
    """What to measure: lengths in tokens.

    ``random`` has the concurrencies of the 8K/1K table, of ``requests`` each and as many as run at
    once at least; ``profile`` those of the traced decode, ``profile_prompts`` the prompts that are
    traced.
    """

    ttft: tuple[int, ...] = (1024, 8192, 32768, 124_000)
    concurrency: tuple[int, ...] = (1, 4, 8)
    decode_prompt: int = 1024
    decode_tokens: int = 256
    repeats: int = 3
    random: tuple[int, ...] = ()
    random_prompt: int = 8192
    random_tokens: int = 1024
    requests: int = 16
    profile: tuple[int, ...] = (1, 8)
    profile_context: int = 8192
    profile_prompts: tuple[int, ...] = (8192,)


class Growth:
    """How far some answers that run at once have come."""

    def __init__(self, answers: int) -> None:
        self.answers = answers
        self._chunks: dict[int, int] = {}
        self._more = asyncio.Event()

    def arrived(self, answer: Answer) -> None:
        """Take note of a chunk; for `gates.client`, at each."""
        self._chunks[id(answer)] = len(answer.chunks)
        self._more.set()

    async def by(self, chunks: int) -> None:
        """Return when each answer has so many chunks more than now."""
        before = self._chunks.copy()
        while len(self._chunks) < self.answers or any(
            now - before.get(one, 0) < chunks for one, now in self._chunks.items()
        ):
            self._more.clear()
            await self._more.wait()


async def _first(wanted: Coroutine[Any, Any, None], ended: asyncio.Future[Any]) -> bool:
    """Whether ``wanted`` returned before ``ended`` did."""
    waiting = asyncio.create_task(wanted)
    await asyncio.wait([waiting, ended], return_when=asyncio.FIRST_COMPLETED)
    done = waiting.done()
    waiting.cancel()
    return done


@dataclass
class Budget:
    """Seconds on the clock from now on."""

    seconds: float
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """What is left; never below zero."""
        return max(0.0, self.seconds - (time.monotonic() - self.began))


class OutOfTime(Exception):
    """The budget does not allow the next cell."""


class Failed(Exception):
    """A request failed; its fault is in the row that was written."""


class Bench:
    """Sends requests to one server and writes a row for each cell."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        model: str,
        vocabulary: int,
        rows: Rows,
        budget: Budget,
        compile_log: Path,
        traces: Path | None = None,
    ) -> None:
        self.http, self.model, self.rows, self.budget = http, model, rows, budget
        self.compile_log, self.traces = compile_log, traces
        self._read: set[Path] = set()
        self.tokens = range(min(FIRST_WORD, vocabulary // 2), vocabulary)
        self.draw = random.Random(20261123)

    async def all(self, plan: Plan) -> None:
        """Every cell of a plan, those that take least first.

        Raises:
            OutOfTime: The budget is spent; the cell is named.
            Failed: A request failed.
        """
        await self.first_requests()
        for concurrency in plan.concurrency:
            await self.decode(concurrency, plan)
        for length in plan.ttft:
            await self.time_to_first_token(length, plan.repeats)
        for concurrency in plan.random:
            await self.random(concurrency, plan)
        if self.traces is not None:
            for concurrency in plan.profile:
                await self.profile_decode(concurrency, plan)
            for length in plan.profile_prompts:
                await self.profile_prefill(length)

    async def first_requests(self) -> None:
        """The first request after the start, and another like it."""
        for number in (1, 2):
            await self._cell(
                "request", {"number": number}, lambda: self._wave(1, FIRST_PROMPT, FIRST_TOKENS)
            )

    async def time_to_first_token(self, length: int, repeats: int) -> None:
        """Prompts of one length, one at a time, after one that is not counted."""
        await self._warm("ttft", {"prompt_tokens": length}, lambda: self._wave(1, length, 1))
        await self._cell(
            "ttft",
            {"prompt_tokens": length},
            *[lambda: self._wave(1, length, 1) for _ in range(repeats)],
        )

    async def decode(self, concurrency: int, plan: Plan) -> None:
        """Answers side by side, after a short wave that is not counted."""
        key = {"concurrency": concurrency, "prompt_tokens": plan.decode_prompt}
        short = max(2, plan.decode_tokens // 8)
        await self._warm("decode", key, lambda: self._wave(concurrency, plan.decode_prompt, short))
        await self._cell(
            "decode",
            {**key, "max_tokens": plan.decode_tokens},
            *[
                lambda: self._wave(concurrency, plan.decode_prompt, plan.decode_tokens)
                for _ in range(plan.repeats)
            ],
        )

    async def random(self, concurrency: int, plan: Plan) -> None:
        """As the table of random 8K/1K: all requests at hand, so many at a time, temperature 0.

        Before them a wave of short answers that is not counted.
        """
        key = {"concurrency": concurrency, "prompt_tokens": plan.random_prompt}
        short = max(2, plan.random_tokens // 32)
        await self._warm("random", key, lambda: self._wave(concurrency, plan.random_prompt, short))
        await self._cell(
            "random",
            {**key, "max_tokens": plan.random_tokens, "temperature": 0.0},
            lambda: self._queue(plan, concurrency),
        )

    async def profile_decode(self, concurrency: int, plan: Plan) -> None:
        """Trace steps of running answers: prompts are read when the profiler starts.

        It stops after ``PROFILE_S``, when each answer has grown by ``PROFILE_CHUNKS``: on a busy
        machine no step may fall into so short a time.
        """
        growth = Growth(concurrency)
        ended = asyncio.gather(
            *(
                self.ask(plan.profile_context, PROFILE_TOKENS, growth.arrived)
                for _ in range(concurrency)
            )
        )
        begun = {"of": "decode", "concurrency": concurrency, "context": plan.profile_context}
        if await _first(growth.by(2), ended):
            await self._trace("start")
            slept = asyncio.create_task(asyncio.sleep(PROFILE_S))
            grown = await _first(growth.by(PROFILE_CHUNKS), ended)
            await slept
            await self._trace("stop")
            if not grown and not any(answer.fault for answer in await ended):
                raise Failed("profile of decode: the answers ended before the profiler had begun")
        self._profiled(begun, await ended)

    async def profile_prefill(self, length: int) -> None:
        """Trace the chunks of one prompt."""
        await self._trace("start")
        answer = await self.ask(length, 1)
        await self._trace("stop")
        self._profiled({"of": "prefill", "prompt_tokens": length}, [answer])

    async def _trace(self, action: str) -> None:
        """Start or stop the server's profiler; at the stop it writes its trace."""
        try:
            reply = await self.http.post(f"/{action}_profile", timeout=max(1.0, self.budget.left))
            reply.raise_for_status()
        except httpx.HTTPError as error:
            raise Failed(f"the profiler did not {action}: {error}") from error

    def _profiled(self, key: dict[str, Any], answers: Sequence[Answer]) -> None:
        """A row of the newest trace of rank 0."""
        assert self.traces is not None
        if faults := [f"{one.fault}: {one.detail}" for one in answers if one.fault]:
            if self.budget.left <= 0:
                raise OutOfTime(f"profile of {key['of']}")
            raise Failed(f"profile of {key['of']}: {faults[0]}")
        found = [path for path in self.traces.glob("*.json*") if path not in self._read]
        # Ranks trace alike.
        found = sorted(path for path in found if "_rank" not in path.name or "_rank0." in path.name)
        if not found:
            raise Failed(f"the profiler left no trace of {key['of']} in {self.traces}")
        self._read.update(found)
        try:
            seen = trace.profile(trace.load(found[0]), key["of"])
        except ValueError as error:
            raise Failed(f"profile of {key['of']}: {error}") from error
        self.rows.add("profile", **key, **seen.record())

    async def _queue(self, plan: Plan, concurrency: int) -> list[Answer]:
        waiting = list(range(max(plan.requests, concurrency)))
        answers: list[Answer] = []

        async def work() -> None:
            while waiting:
                waiting.pop()
                answers.append(await self.ask(plan.random_prompt, plan.random_tokens))

        await asyncio.gather(*(work() for _ in range(concurrency)))
        return answers

    async def _wave(self, count: int, prompt: int, tokens: int) -> list[Answer]:
        return list(await asyncio.gather(*(self.ask(prompt, tokens) for _ in range(count))))

    async def ask(
        self, prompt: int, tokens: int, on_chunk: Callable[[Answer], None] | None = None
    ) -> Answer:
        """One request of fresh random tokens, answered in full at temperature 0."""
        left = max(1.0, self.budget.left)
        body = {
            "model": self.model,
            "prompt": self.draw.choices(self.tokens, k=prompt),
            "max_tokens": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        limits = Timeouts(first_token_s=left, stall_s=left, total_s=left)
        answer = await client.stream(self.http, body, limits, "/v1/completions", on_chunk)
        if not answer.fault and (answer.prompt_tokens, answer.completion_tokens) != (
            prompt,
            tokens,
        ):
            answer.fail("usage", f"{answer.prompt_tokens} and {answer.completion_tokens} tokens")
        return answer

    async def _warm(
        self, kind: str, key: dict[str, Any], wave: Callable[[], Awaitable[list[Answer]]]
    ) -> None:
        """A wave that is not counted: what compiles in it is kept as a row of its own."""
        await self._cell("warm-up", {"of": kind, **key}, wave)

    async def _cell(
        self,
        kind: str,
        key: dict[str, Any],
        *waves: Callable[[], Awaitable[Sequence[Answer]]],
    ) -> None:
        """Run a cell's waves one after another and write its row."""
        named = " ".join(f"{name}={value}" for name, value in key.items())
        took: list[float] = []
        compiled = len(startup.compilations(self.compile_log))
        before = await server.read_metrics(self.http)
        answers: list[Sequence[Answer]] = []
        for wave in waves:
            if self.budget.left <= max(took, default=0.0):
                raise OutOfTime(f"{kind} {named}")
            began = time.monotonic()
            answers.append(await wave())
            took.append(time.monotonic() - began)
        found = figures.row(answers)
        after = await server.read_metrics(self.http)
        new = startup.compilations(self.compile_log)[compiled:]
        faults = [f"{one.fault}: {one.detail}" for wave in answers for one in wave if one.fault]
        self.rows.add(
            kind,
            **key,
            **{name: found[name] for name in KEPT if name in found},
            **server.acceptance(before, after),
            compiled=len(new),
            compiled_kernels=sorted({one["kernel"] for one in new}),
            **({"fault": faults[0]} if faults else {}),
        )
        if faults:
            if self.budget.left <= 0:
                raise OutOfTime(f"{kind} {named}")
            raise Failed(f"{kind} {named}: {faults[0]}")
