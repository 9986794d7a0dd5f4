"""Prompts of given lengths at given concurrencies: latency, decode rate, throughput, recall."""

from __future__ import annotations

from statistics import fmean
from typing import Any, Literal

from pydantic import Field, model_validator

from gates import figures
from gates.figures import Figures
from gates.prompts.fit import CHARACTERS_A_TOKEN
from gates.server import acceptance
from gates.session import Cell, Request, Session, note_of
from gates.spec import Gate
from gates.toml import Strict
from gates.workloads.base import RowNumbers, Workload

Kind = Literal["archive", "story", "audit", "random", "question"]
LABELS = {
    "archive": "archive",
    "story": "story recall",
    "audit": "security audit",
    "random": "random words",
    "question": "question",
}


class Case(Strict):
    """One load, at each of its concurrencies.

    Either ``prompt_tokens``, the length by the server's tokenizer with its chat template, or
    ``frontier``, a length in characters. Without ``requests`` a repeat is one wave of
    ``concurrency`` requests at once; with it, so many requests go through as many workers.
    """

    prompt: Kind
    label: str = ""
    prompt_tokens: int | None = Field(default=None, ge=32)
    frontier: int | None = Field(default=None, ge=256)
    concurrency: RowNumbers = Field(default=[1], min_length=1)
    requests: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(ge=1)
    temperature: float = Field(default=0.0, ge=0, le=2)
    thinking: bool | None = None
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _one_length(self) -> Case:
        if (self.prompt_tokens is None) == (self.frontier is None) and self.prompt != "question":
            raise ValueError("a case needs one of prompt_tokens and frontier")
        if any(one < 1 for one in self.concurrency):
            raise ValueError("concurrency must be 1 or more")
        return self

    @property
    def tokens(self) -> int:
        """The prompt's length, guessed where it is given in characters."""
        return self.prompt_tokens or round((self.frontier or 400) / CHARACTERS_A_TOKEN)


class Params(Strict):
    """The cases of the gate."""

    cases: list[Case] = Field(min_length=1)


class Load(Workload):
    """Waves or queues of prompts."""

    Params = Params
    KEYS = frozenset(
        {
            "prompt",
            "prompt_tokens",
            "frontier",
            "concurrency",
            "max_tokens",
            "temperature",
            "thinking",
        }
    )
    FIGURES = figures.ROW | {
        "acceptance",
        "acceptance_length",
        "recalled",
        "recalled_min",
        "matched",
        "matched_min",
    }

    def cells(self, gate: Gate, params: Params) -> list[list[Cell]]:
        """A row for each case and concurrency."""
        rows = []
        for case in params.cases:
            for concurrency in case.concurrency:
                count = case.requests or concurrency
                key: dict[str, Any] = {"prompt": case.label or LABELS[case.prompt]}
                if case.frontier is not None:
                    key["frontier"] = case.frontier
                if case.prompt_tokens is not None:
                    key["prompt_tokens"] = case.prompt_tokens
                key |= {
                    "concurrency": concurrency,
                    "max_tokens": case.max_tokens,
                    "temperature": case.temperature,
                }
                if case.thinking is not None:
                    key["thinking"] = case.thinking
                rows.append(
                    [
                        Cell(
                            gate.name,
                            key,
                            repeat,
                            (case, concurrency),
                            weight=count * (case.tokens + 10 * case.max_tokens),
                            requests=count,
                            longest=case.tokens + case.max_tokens,
                        )
                        for repeat in range(1, gate.repeats + 1)
                    ]
                )
        return rows

    async def measure(self, session: Session) -> Figures:
        """Make the prompts, read the counters, send, read the counters again."""
        case, concurrency = session.cell.plan
        requests = [
            await self._request(session, case, number)
            for number in range(case.requests or concurrency)
        ]
        before = await session.metrics()
        await session.queue(requests, concurrency)
        return acceptance(before, await session.metrics())

    async def _request(self, session: Session, case: Case, number: int) -> Request:
        if case.prompt_tokens is not None:
            made, fitted = await session.prompt(case.prompt, number, case.prompt_tokens)
        else:
            made, fitted = await session.prompt_of_characters(
                case.prompt, number, case.frontier or 0
            )
        return Request(
            [{"role": "user", "content": fitted.text}],
            max_tokens=case.max_tokens,
            temperature=case.temperature,
            thinking=case.thinking,
            ignore_eos=case.ignore_eos,
            document=made,
            note=note_of(fitted, wanted_tokens=case.prompt_tokens),
        )

    def row(self, measured: Any) -> Figures:
        """What all answers give, and how much of what was hidden came back, as share and number."""
        result = super().row(measured)
        notes = [
            entry["note"]
            for cell in measured
            for entry in cell["answers"]
            if entry["note"].get("hidden")
        ]
        if notes:
            shares = [note["found"] / note["hidden"] for note in notes]
            numbers = [note["found"] for note in notes]
            result["recalled"], result["recalled_min"] = fmean(shares), min(shares)
            result["matched"], result["matched_min"] = fmean(numbers), min(numbers)
        return result
