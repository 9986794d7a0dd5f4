"""Requests that arrive beside others: a long prompt beside a running answer, bursts, streams."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from gates import figures
from gates.answer import Answer
from gates.figures import Figures
from gates.server import acceptance
from gates.session import Cell, Request, Session, note_of
from gates.spec import Gate
from gates.toml import Strict
from gates.workloads.base import Workload, waves
from gates.workloads.load import Kind

Role = Literal["primary", "secondary"]
ROLES: tuple[Role, ...] = ("primary", "secondary")


class Stream(Strict):
    """Requests of one role.

    They begin ``at_s`` seconds after the case, or after the first token of every request of the
    role in ``after_first_token_of``; each next one ``every_s`` later.
    """

    role: Role
    prompt: Kind = "archive"
    prompt_tokens: int = Field(ge=32)
    max_tokens: int = Field(ge=1)
    count: int = Field(default=1, ge=1)
    at_s: float = Field(default=0.0, ge=0)
    every_s: float = Field(default=0.0, ge=0)
    after_first_token_of: Role | None = None
    temperature: float = Field(default=0.0, ge=0, le=2)
    ignore_eos: bool = False


class Case(Strict):
    """Streams that run at the same time, under a name."""

    name: str = Field(pattern=r"^[a-z0-9]+(_[a-z0-9]+)*$")
    streams: list[Stream] = Field(min_length=1)

    @model_validator(mode="after")
    def _begins(self) -> Case:
        waited = {stream.after_first_token_of for stream in self.streams} - {None}
        first = {stream.role for stream in self.streams if not stream.after_first_token_of}
        if not waited <= first:
            raise ValueError("after_first_token_of must name a role that waits for none itself")
        return self


class Params(Strict):
    """The cases; an answer with a stall longer than ``slow_stall_s`` counts as slow."""

    cases: list[Case] = Field(min_length=1)
    slow_stall_s: float = Field(default=10.0, gt=0)


class Arrival(Workload):
    """Streams of requests of two roles."""

    Params = Params
    KEYS = frozenset({"case"})
    FIGURES = (
        figures.ROW
        | {f"{role}_{name}" for role in ROLES for name in figures.ROW}
        | {"acceptance", "acceptance_length", "recalled", "overlapped"}
    )

    def cells(self, gate: Gate, params: Params) -> list[list[Cell]]:
        """A row a case."""
        rows = []
        for case in params.cases:
            count = sum(stream.count for stream in case.streams)
            weight = sum(s.count * (s.prompt_tokens + 10 * s.max_tokens) for s in case.streams)
            longest = max(s.prompt_tokens + s.max_tokens for s in case.streams)
            rows.append(
                [
                    Cell(
                        gate.name,
                        {"case": case.name},
                        repeat,
                        (case, params.slow_stall_s),
                        weight=weight,
                        requests=count,
                        longest=longest,
                    )
                    for repeat in range(1, gate.repeats + 1)
                ]
            )
        return rows

    async def measure(self, session: Session) -> Figures:
        """Make all prompts, then let each stream begin when it is to."""
        case, slow_stall = session.cell.plan
        prepared: list[list[Request]] = []
        for place, stream in enumerate(case.streams):
            made = [
                await self._request(session, stream, f"{place}/{n}") for n in range(stream.count)
            ]
            prepared.append(made)
        before = await session.metrics()
        started = {role: _Countdown() for role in ROLES}
        for stream in case.streams:
            started[stream.role].left += stream.count
        await asyncio.gather(
            *(
                self._send(session, stream, request, number, started)
                for stream, requests in zip(case.streams, prepared, strict=True)
                for number, request in enumerate(requests)
            )
        )
        return acceptance(before, await session.metrics()) | {"slow_stall_s": slow_stall}

    async def _request(self, session: Session, stream: Stream, number: str) -> Request:
        made, fitted = await session.prompt(stream.prompt, number, stream.prompt_tokens)
        return Request(
            [{"role": "user", "content": fitted.text}],
            max_tokens=stream.max_tokens,
            temperature=stream.temperature,
            ignore_eos=stream.ignore_eos,
            role=stream.role,
            document=made,
            note=note_of(fitted, wanted_tokens=stream.prompt_tokens),
        )

    async def _send(
        self,
        session: Session,
        stream: Stream,
        request: Request,
        number: int,
        started: Mapping[Role, _Countdown],
    ) -> Answer:
        if stream.after_first_token_of:
            await started[stream.after_first_token_of].done.wait()
        await asyncio.sleep(stream.at_s + number * stream.every_s)
        first = _once(started[stream.role].count)
        return await session.ask(request, on_first=first)

    def row(self, measured: Sequence[Mapping[str, Any]]) -> Figures:
        """The figures of all answers, and of each role's."""
        slow = measured[0]["figures"].get("slow_stall_s")
        result = super().row(measured)
        result.pop("slow_stall_s", None)
        everything = [wave for cell in measured for wave in waves(cell["answers"])]
        result["slow"] = figures.row(everything, slow)["slow"]
        for role in ROLES:
            of_role = [
                wave
                for cell in measured
                for wave in waves([e for e in cell["answers"] if e["role"] == role])
            ]
            if of_role:
                told = figures.row(of_role, slow)
                result |= {f"{role}_{name}": value for name, value in told.items()}
        shares = [
            entry["note"]["found"] / entry["note"]["hidden"]
            for cell in measured
            for entry in cell["answers"]
            if entry["note"].get("hidden")
        ]
        if shares:
            result["recalled"] = sum(shares) / len(shares)
        beside = [overlapped(cell["answers"]) for cell in measured]
        if known := [share for share in beside if share is not None]:
            result["overlapped"] = sum(known) / len(known)
        return result


def overlapped(entries: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of the secondaries during which a primary ran; None where there are not both.

    A primary runs from its sending to its last chunk. What counts of a secondary is its first
    chunk: where every primary had ended by then, the two were not measured beside each other.
    """
    answers: dict[str, list[Answer]] = {role: [] for role in ROLES}
    for entry in entries:
        if entry["role"] in answers and entry["answer"].chunks:
            answers[entry["role"]].append(entry["answer"])
    spans = [(one.sent_at, one.sent_at + one.chunks[-1].at) for one in answers["primary"]]
    firsts = [one.sent_at + one.chunks[0].at for one in answers["secondary"]]
    if not spans or not firsts:
        return None
    return sum(any(begin <= at <= end for begin, end in spans) for at in firsts) / len(firsts)


class _Countdown:
    """Is done when every request of a role has had its first token, or will have none."""

    def __init__(self) -> None:
        self.left = 0
        self.done = asyncio.Event()

    def count(self) -> None:
        self.left -= 1
        if self.left <= 0:
            self.done.set()


def _once(function: Any) -> Any:
    """A function that works the first time it is called."""
    called = []

    def once() -> None:
        if not called:
            called.append(True)
            function()

    return once
