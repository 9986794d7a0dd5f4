"""What went wrong in the server while the run lasted, by its own counters and its log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gates import logs
from gates.figures import Figures
from gates.server import Metrics
from gates.session import Cell, Session
from gates.spec import Gate
from gates.toml import Strict
from gates.workloads.base import Workload, mean

# Counters of vLLM that a good run leaves at rest; preemptions cost time and no answer.
BAD = {
    "corrupted_requests": ("corrupted_requests",),
    "aborted": ("request_success.abort",),
    "errors": ("request_success.error",),
    "http_5xx": ("http_5xx", "http_500", "http_503"),
}


class Params(Strict):
    """Nothing to choose."""


class Counters(Workload):
    """One row; nothing is sent."""

    Params = Params
    KEYS = frozenset({"since"})
    FIGURES = frozenset({*BAD, "preemptions", "finished", *(f"log_{kind}" for kind in logs.ERRORS)})
    guarded = False

    def cells(self, gate: Gate, params: Params) -> list[list[Cell]]:
        """One row, not repeated."""
        return [[Cell(gate.name, {"since": "the run began"}, 1, params, weight=1, requests=0)]]

    async def measure(self, session: Session) -> Figures:
        """Compare the counters with those at the run's begin, and read the log."""
        told: Figures = {}
        after = await session.metrics()
        begins = session.folder.of("metrics")
        if after is not None and begins:
            told |= grown([row["values"] for row in begins], after)
        if session.options.get("server_log"):
            found = logs.errors(logs.text(session.options["server_log"]))
            told |= {f"log_{kind}": count for kind, count in found.items()}
        if not told:
            raise ValueError("neither /metrics nor --server-log says anything")
        return told

    def row(self, measured: Any) -> Figures:
        """As it was."""
        return mean(cell["figures"] for cell in measured)


def grown(begins: list[Metrics], after: Metrics) -> Figures:
    """How much each counter grew since the run began.

    A counter that is lower than it was belongs to a server that started anew (a resumed run): it
    counts from zero.
    """
    before: Mapping[str, float] = begins[0]

    def grew(*names: str) -> int:
        total = 0.0
        for name in names:
            value, then = after.get(name, 0.0), before.get(name, 0.0)
            total += value - then if value >= then else value
        return int(total)

    told: Figures = {name: grew(*counters) for name, counters in BAD.items()}
    told["preemptions"] = grew("num_preemptions")
    told["finished"] = grew("request_success")
    return told
