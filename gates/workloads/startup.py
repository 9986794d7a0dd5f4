"""The server's start: how long it took, what its log says, and the first request after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from gates import figures, logs
from gates.figures import Figures
from gates.session import Cell, Request, Session, note_of
from gates.spec import Gate
from gates.toml import Strict
from gates.workloads.base import Workload


class Params(Strict):
    """The first request and those like it after it."""

    prompt_tokens: int = Field(default=256, ge=64)
    max_tokens: int = Field(default=16, ge=1)


class Startup(Workload):
    """Two rows: the first request after the start, and the same again. Neither is repeated."""

    Params = Params
    KEYS = frozenset({"request"})
    FIGURES = figures.ROW | {
        "ready_s",
        "init_s",
        "graph_s",
        "graphs_piecewise",
        "graphs_full",
        "kv_cache_tokens",
        "answered_before",
        "log_errors",
    }
    guarded = False

    def cells(self, gate: Gate, params: Params) -> list[list[Cell]]:
        """First, and again."""
        return [
            [
                Cell(
                    gate.name,
                    {"request": request},
                    1,
                    params,
                    weight=params.prompt_tokens + 10 * params.max_tokens,
                    requests=1,
                    longest=params.prompt_tokens + params.max_tokens,
                )
            ]
            for request in ("first", "second")
        ]

    async def measure(self, session: Session) -> Figures:
        """Send one request; with the first, take down what the start and the log say."""
        params = session.cell.plan
        made, fitted = await session.prompt("archive", 0, params.prompt_tokens)
        await session.ask(
            Request(
                [{"role": "user", "content": fitted.text}],
                max_tokens=params.max_tokens,
                note=note_of(fitted, wanted_tokens=params.prompt_tokens),
            )
        )
        if session.cell.key["request"] != "first":
            return {}
        told: Figures = {}
        if session.server.answered_before is not None:
            told["answered_before"] = session.server.answered_before
        if session.options.get("start"):
            told["ready_s"] = session.options["start"]["ready_s"]
        if session.options.get("server_log"):
            told |= logs.startup(session.options["server_log"])
        return told

    def row(self, measured: Sequence[Mapping[str, Any]]) -> Figures:
        """As it was: nothing is averaged."""
        return super().row(measured)
