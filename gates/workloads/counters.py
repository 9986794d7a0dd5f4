"""What went wrong in the server while the run lasted, by its own counters and its log."""

from __future__ import annotations

import re
from typing import Any

from gates import logs
from gates.figures import Figures
from gates.server import Metrics
from gates.session import Cell, Session
from gates.spec import Gate
from gates.toml import Strict
from gates.workloads.base import Workload, mean

# What is counted, by the name of its counter, and by the family that it is one label of.
#
# A counter of a labelled family comes to be with its first increment: where the family has another
# member, an absent one stands for zero. A counter without such a family (the last column is empty)
# is there from the server's start or never: absent, nobody counted, and nothing is said of it. So
# it is with corrupted_requests, which vLLM has under VLLM_COMPUTE_NANS_IN_LOGITS alone.
# Preemptions cost time and no answer.
COUNTED = {
    "corrupted_requests": (r"corrupted_requests", r""),
    "aborted": (r"request_success\.abort", r"request_success\.\w+"),
    "errors": (r"request_success\.error", r"request_success\.\w+"),
    "http_5xx": (r"http_5(?:xx|\d\d)", r"http_\d(?:xx|\d\d)"),
    "preemptions": (r"num_preemptions", r""),
    "finished": (r"request_success", r""),
}


class Params(Strict):
    """Nothing to choose."""


class Counters(Workload):
    """One row; nothing is sent."""

    Params = Params
    KEYS = frozenset({"since"})
    FIGURES = frozenset({*COUNTED, *(f"log_{kind}" for kind in logs.ERRORS)})
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
            told |= grown(begins[0]["values"], after)
        if session.options.get("server_log"):
            found = logs.errors(logs.text(session.options["server_log"]))
            told |= {f"log_{kind}": count for kind, count in found.items()}
        if after is None and begins:
            # The log alone would let a server pass that is no longer there.
            said = ", ".join(f"{name} {count}" for name, count in told.items() if count)
            raise ValueError(
                "/metrics answered when the run began and does not now; "
                f"the log has {said or 'nothing, or there is none'}"
            )
        if not told:
            raise ValueError("neither /metrics nor --server-log says anything")
        return told

    def row(self, measured: Any) -> Figures:
        """As it was."""
        return mean(cell["figures"] for cell in measured)


def grown(before: Metrics, after: Metrics) -> Figures:
    """How much each counter grew since the run began; those that the server has not are left out.

    A counter that is lower than it was belongs to a server that started anew (a resumed run): it
    counts from zero.
    """
    told: Figures = {}
    for figure, (counter, family) in COUNTED.items():
        names = _matching(counter, after)
        if names or (family and _matching(family, after)):
            told[figure] = int(sum(_grew(before.get(name, 0.0), after[name]) for name in names))
    return told


def _matching(pattern: str, metrics: Metrics) -> list[str]:
    return [name for name in metrics if re.fullmatch(pattern, name)]


def _grew(then: float, now: float) -> float:
    return now - then if now >= then else now
