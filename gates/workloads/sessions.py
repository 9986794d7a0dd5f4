"""Conversations of several turns behind a shared beginning: does the prefix cache keep its word."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from gates import figures
from gates.figures import Figures
from gates.prompts import document, prose
from gates.session import Cell, Request, Session
from gates.spec import Gate
from gates.toml import Strict
from gates.workloads.base import RowNumbers, Workload

SENTENCE_TOKENS = 26
FACTS = ("lantern", "anchor", "ferry", "granary", "pilot", "bridge", "market", "sluice", "beacon")


class Params(Strict):
    """``fillers``: the sentences of the shared beginning. Each conversation tells a fact a turn and
    asks for the one before; ``sessions`` of them run at once.
    """

    fillers: RowNumbers = Field(min_length=1)
    sessions: int = Field(default=4, ge=1)
    turns: int = Field(default=4, ge=2, le=len(FACTS))
    max_tokens: int = Field(default=64, ge=8)


class Sessions(Workload):
    """Conversations that share a long beginning."""

    Params = Params
    KEYS = frozenset({"filler"})
    FIGURES = figures.ROW | {
        "recalled",
        "first_turn_ttft_mean",
        "later_turns_ttft_mean",
        "hit_share",
    }

    def cells(self, gate: Gate, params: Params) -> list[list[Cell]]:
        """A row a length of the beginning."""
        return [
            [
                Cell(
                    gate.name,
                    {"filler": filler},
                    repeat,
                    (filler, params),
                    weight=params.sessions * (filler * SENTENCE_TOKENS + 40 * params.max_tokens),
                    requests=params.sessions * params.turns,
                    longest=filler * SENTENCE_TOKENS + params.turns * (params.max_tokens + 64),
                )
                for repeat in range(1, gate.repeats + 1)
            ]
            for filler in params.fillers
        ]

    async def measure(self, session: Session) -> Figures:
        """Run the conversations and read how much the cache gave."""
        filler, params = session.cell.plan
        beginning = shared(session.nonce("shared"), filler)
        before = await session.metrics()
        await asyncio.gather(
            *(self._talk(session, params, beginning, n) for n in range(params.sessions))
        )
        after = await session.metrics()
        if before is None or after is None:
            return {}
        asked = after.get("prefix_cache_queries", 0) - before.get("prefix_cache_queries", 0)
        hits = after.get("prefix_cache_hits", 0) - before.get("prefix_cache_hits", 0)
        return {"hit_share": hits / asked} if asked > 0 else {}

    async def _talk(self, session: Session, params: Params, beginning: str, number: int) -> None:
        numbers = secrets(session.nonce(number), params.turns)
        messages: list[dict[str, Any]] = [{"role": "system", "content": beginning}]
        for turn in range(params.turns):
            messages.append({"role": "user", "content": _turn(turn, numbers)})
            request = Request(
                list(messages),
                max_tokens=params.max_tokens,
                document=_wanted(numbers[turn - 1] if turn else numbers[0]),
                note={"turn": turn, "session": number},
            )
            answer = await session.ask(request, wave=turn)
            if answer.fault:
                return
            messages.append({"role": "assistant", "content": answer.text})

    def row(self, measured: Sequence[Mapping[str, Any]]) -> Figures:
        """What all turns give, the first and the later ones apart, and what was recalled."""
        result = super().row(measured)
        entries = [entry for cell in measured for entry in cell["answers"]]
        planned = sum(cell["cell"]["requests"] for cell in measured if "cell" in cell)
        # A conversation that broke off has failed in the turns it did not come to, too.
        result["failures"] += max(0, planned - len(entries))
        for name, chosen in (
            ("first_turn", [e for e in entries if e["note"]["turn"] == 0]),
            ("later_turns", [e for e in entries if e["note"]["turn"] > 0]),
        ):
            told = figures.row([[entry["answer"] for entry in chosen]])
            if "ttft_mean" in told:
                result[f"{name}_ttft_mean"] = told["ttft_mean"]
        if entries:
            result["recalled"] = sum(entry["note"]["found"] for entry in entries) / len(entries)
        return result


def shared(seed: str, sentences: int) -> str:
    """The beginning that all conversations of a cell share, of so many sentences."""
    found: list[str] = []
    for paragraph in prose.paragraphs("sessions"):
        found += paragraph.replace(". ", ".\n").split("\n")
        if len(found) >= sentences:
            break
    return (
        f"{document.nonce(seed)} You keep the notes of a harbour town. Background:\n"
        + " ".join(found[:sentences])
        + "\nAnswer in one short sentence."
    )


def secrets(seed: str, count: int) -> list[int]:
    """The numbers of one conversation."""
    return random.Random(f"secrets {seed}").sample(range(10000, 100000), count)


def _turn(turn: int, numbers: Sequence[int]) -> str:
    told = f"The number of the {FACTS[turn]} is {numbers[turn]}."
    asked = FACTS[turn - 1] if turn else FACTS[0]
    return f"{told} Which number does the {asked} have?"


def _wanted(number: int) -> document.Document:
    return document.Document("", lambda seed: iter(()), "", (), "", (str(number),))
