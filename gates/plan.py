"""What a run will do: every gate, its cells in the order they run, and what is left out and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gates.server import Server
from gates.session import Cell
from gates.spec import Gate, Profile
from gates.workloads import WORKLOADS

Size = Literal["full", "short"]


@dataclass
class Phase:
    """One gate's part of a run. ``why_not`` says why none of it runs; ``skipped`` which cells."""

    gate: Gate
    rows: list[list[Cell]]
    cells: list[Cell] = field(default_factory=list)
    skipped: list[tuple[Cell, str]] = field(default_factory=list)
    why_not: str = ""

    @property
    def weight(self) -> float:
        """Its share of the time, in prompt and answer tokens."""
        return sum(cell.weight for cell in self.cells)

    @property
    def requests(self) -> int:
        """How many requests it sends."""
        return sum(cell.requests for cell in self.cells)


def plan(
    gates: Iterable[Gate],
    size: Size,
    profile: Profile,
    server: Server | None,
    options: Mapping[str, Any],
) -> list[Phase]:
    """The phases of a run.

    Args:
        gates: In the order in which they run.
        size: ``short`` for a look, ``full`` for figures to publish.
        profile: Its limits leave out rows.
        server: What it said of itself; None for a plan without a server.
        options: What the command line gave: paths of data, commands.
    """
    phases = []
    for gate in gates:
        sized = gate.sized(size)
        workload = WORKLOADS[gate.workload]
        params = workload.Params.model_validate(sized.params)
        phase = Phase(sized, workload.cells(sized, params))
        phase.why_not = _unmet(sized, server) or workload.missing(params, options) or ""
        for cell in alternating(phase.rows):
            why = "" if phase.why_not else _too_much(cell, profile, server)
            if why:
                phase.skipped.append((cell, why))
            elif not phase.why_not:
                phase.cells.append(cell)
        if not phase.why_not and not phase.cells:
            phase.why_not = phase.skipped[0][1] if phase.skipped else "it has no rows"
        phases.append(phase)
    return phases


def alternating(rows: list[list[Cell]]) -> list[Cell]:
    """Repeat by repeat, every second one backwards, so that a drift does not favour a row."""
    order: list[Cell] = []
    for number in range(max((len(row) for row in rows), default=0)):
        repeat = [row[number] for row in rows if number < len(row)]
        order += repeat if number % 2 == 0 else repeat[::-1]
    return order


def _unmet(gate: Gate, server: Server | None) -> str:
    if server is None:
        return ""
    needs = gate.needs
    if needs.metrics and not server.has_metrics:
        return "the server has no /metrics"
    if needs.speculation and server.speculation is False:
        return "the server does not draft (no --speculative-config)"
    if needs.prefix_cache == "on" and server.prefix_cache is False:
        return "the server's prefix cache is off; it needs one with --enable-prefix-caching"
    if needs.prefix_cache == "off" and server.prefix_cache:
        return "the server's prefix cache is on; it needs one with --no-enable-prefix-caching"
    return ""


def _too_much(cell: Cell, profile: Profile, server: Server | None) -> str:
    limit = (server.max_model_len if server else None) or profile.max_model_len
    if cell.longest > limit:
        return f"needs {cell.longest:,} tokens, the server takes {limit:,}"
    concurrency = cell.key.get("concurrency", 1)
    if concurrency > profile.max_concurrency:
        return f"concurrency {concurrency} is above the profile's {profile.max_concurrency}"
    return ""
