"""What a workload measures through: requests whose rows are written the moment they end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from gates import client, server
from gates.answer import Answer
from gates.prompts import document
from gates.prompts.document import Document
from gates.prompts.fit import Fitted, fit, fit_characters
from gates.server import Message, Metrics, Server
from gates.spec import Gate, Profile, Timeouts
from gates.store import RunFolder


@dataclass(frozen=True)
class Request:
    """One request of a wave.

    ``thinking`` goes out as ``chat_template_kwargs.thinking`` where it is not None. ``note`` is
    kept in the row. ``document`` is what the answer is scored against.
    """

    messages: list[Message]
    max_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    thinking: bool | None = None
    effort: str | None = None
    ignore_eos: bool = False
    tools: list[dict[str, Any]] | None = None
    role: str = ""
    document: Document | None = None
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """The smallest thing that is measured whole: one row of the table, one repeat of it.

    ``key`` names the row, ``plan`` is what the workload needs for it; ``weight`` is its share of
    the time, in prompt and answer tokens.
    """

    gate: str
    key: dict[str, Any]
    repeat: int
    plan: Any
    weight: float
    requests: int
    longest: int = 0

    @property
    def id(self) -> str:
        """Unique in a run, and the same when it is resumed."""
        said = " ".join(f"{name}={value}" for name, value in self.key.items())
        return f"{self.gate}: {said} #{self.repeat}"


@dataclass
class Session:
    """One cell being measured. `ask` never raises for what the server does."""

    http: httpx.AsyncClient
    server: Server
    folder: RunFolder
    gate: Gate
    cell: Cell
    attempt: int
    seed: str
    options: dict[str, Any]
    lengths: dict[tuple[str, int], int]
    profile: Profile | None = None
    report: Callable[[Answer], None] | None = None

    @property
    def timeouts(self) -> Timeouts:
        """The gate's."""
        return self.gate.timeouts

    def nonce(self, number: object) -> str:
        """The seed of a cold prompt: of this run, cell and attempt, and no other."""
        return f"{self.seed}/{self.cell.id}/{self.attempt}/{number}"

    def logs(self, name: str) -> Path:
        """A path for what a child process writes, in the run's folder."""
        folder = self.folder.path / "logs"
        folder.mkdir(exist_ok=True)
        return folder / name

    async def metrics(self) -> Metrics | None:
        """``/metrics`` now."""
        return await server.read_metrics(self.http) if self.server.has_metrics else None

    async def count(self, text: str) -> int | None:
        """The tokens of a prompt with the chat template, where the server counts."""
        if not self.server.has_tokenize:
            return None
        return await server.count_tokens(self.http, self.server, [_user(text)])

    async def prompt(self, kind: str, number: object, tokens: int) -> tuple[Document, Fitted]:
        """A cold prompt of a length, counted by the server's tokenizer before it is sent.

        Raises:
            StackError: It cannot be had in that length.
        """
        made = document.KINDS[kind](self.nonce(number))
        start = self.lengths.get((kind, tokens))
        fitted = await fit(made, tokens, self.count, start)
        self.lengths[kind, tokens] = fitted.characters
        return made, fitted

    async def prompt_of_characters(
        self, kind: str, number: object, characters: int
    ) -> tuple[Document, Fitted]:
        """A cold prompt of about so many characters, and its tokens."""
        made = document.KINDS[kind](self.nonce(number))
        text = fit_characters(made, characters)
        return made, Fitted(text, await self.count(text), characters)

    async def ask(
        self,
        request: Request,
        wave: int = 0,
        on_first: Callable[[], None] | None = None,
    ) -> Answer:
        """Send one request, write its row and return what came.

        Args:
            request: What to send.
            wave: Requests of one wave count as one load.
            on_first: Called when the first token has come, or when there will be none.
        """

        def on_chunk(answer: Answer) -> None:
            if on_first and len(answer.chunks) == 1:
                on_first()

        try:
            answer = await client.stream(
                self.http, body_of(self.server, request), self.timeouts, on_chunk=on_chunk
            )
        finally:
            if on_first:
                on_first()
        self._check_length(request, answer)
        note = dict(request.note)
        if request.document is not None and request.document.answers:
            note["found"] = request.document.found(answer.text)
            note["hidden"] = len(request.document.answers)
        self.folder.write(
            "request",
            gate=self.gate.name,
            cell=self.cell.id,
            attempt=self.attempt,
            wave=wave,
            role=request.role,
            note=note,
            answer=answer.record(),
        )
        if self.report:
            self.report(answer)
        return answer

    def _check_length(self, request: Request, answer: Answer) -> None:
        """A server that counts a prompt in two ways has one of them wrong."""
        counted = request.note.get("counted_tokens")
        if counted and answer.prompt_tokens is not None and answer.prompt_tokens != counted:
            answer.fail(
                "usage", f"{answer.prompt_tokens} prompt tokens, but /tokenize counted {counted}"
            )

    async def together(self, sending: Sequence[Awaitable[Answer]]) -> list[Answer]:
        """Run requests at the same time."""
        return list(await asyncio.gather(*sending))

    async def queue(self, requests: Sequence[Request], concurrency: int) -> list[Answer]:
        """Run requests through so many workers: each takes the next when its last one ended."""
        waiting = iter(requests)

        async def worker() -> list[Answer]:
            return [await self.ask(request) for request in waiting]

        done = await asyncio.gather(*(worker() for _ in range(concurrency)))
        return [answer for answers in done for answer in answers]


def body_of(target: Server, request: Request) -> dict[str, Any]:
    """A request as it is sent to a server."""
    body: dict[str, Any] = {
        "model": target.model,
        "messages": request.messages,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.top_p is not None:
        body["top_p"] = request.top_p
    if request.seed is not None:
        body["seed"] = request.seed
    template = {"thinking": request.thinking, "reasoning_effort": request.effort}
    if template := {name: value for name, value in template.items() if value is not None}:
        body["chat_template_kwargs"] = template
    if request.tools is not None:
        body["tools"], body["tool_choice"] = request.tools, "auto"
    # Fields of vLLM's own: another server may refuse a request that has them.
    if target.version is not None:
        body["stream_options"]["continuous_usage_stats"] = True
        if request.ignore_eos:
            body["ignore_eos"] = True
    return body


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def note_of(fitted: Fitted, **more: Any) -> dict[str, Any]:
    """What a row keeps of its prompt."""
    return {"counted_tokens": fitted.tokens, **more}
