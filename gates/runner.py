"""Run the phases: nothing that a server or a phase does stops the rest, and nothing is lost."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Mapping
from typing import Any

import httpx

from gates import client, server
from gates.answer import Answer
from gates.figures import row as row_figures
from gates.plan import Phase
from gates.progress import Display
from gates.server import Server
from gates.session import Cell, Request, Session, body_of
from gates.spec import Gate, Profile, Timeouts
from gates.store import RunFolder
from gates.workloads import WORKLOADS
from gates.workloads.base import waves
from stack.errors import StackError

GUARD = Timeouts(first_token_s=120, stall_s=60, total_s=180)
GUARD_TRIES = 3
GUARD_WAIT_S = 5.0


class Runner:
    """One run over its phases. `run` may be called again on the same folder: it goes on."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        target: Server,
        folder: RunFolder,
        phases: list[Phase],
        profile: Profile,
        options: Mapping[str, Any],
        display: Display,
        guard: Timeouts = GUARD,
        guard_wait_s: float | None = None,
    ) -> None:
        self.http, self.target, self.folder, self.phases = http, target, folder, phases
        self.profile, self.options, self.display = profile, dict(options), display
        self.guard_timeouts = guard
        self.guard_wait_s = GUARD_WAIT_S if guard_wait_s is None else guard_wait_s
        self.lengths: dict[tuple[str, int], int] = {}

    async def run(self) -> None:
        """Measure what is not on disk yet."""
        done = self._measured()
        cells = [cell for phase in self.phases for cell in phase.cells]
        self.display.total(
            sum(cell.weight for cell in cells),
            sum(cell.weight for cell in cells if cell.id in done),
        )
        values = None if self.folder.of("metrics") else await server.read_metrics(self.http)
        if values is not None:
            self.folder.write("metrics", values=values)
        for number, phase in enumerate(self.phases, 1):
            left = [cell for cell in phase.cells if cell.id not in done]
            self._leave_out(phase)
            if phase.why_not:
                self.display.say(
                    f"[{number}/{len(self.phases)}] {phase.gate.title}: not run: {phase.why_not}"
                )
                self._state(phase.gate, "not run", phase.why_not)
                continue
            if not left and self._ended(phase.gate):
                continue
            self.display.phase(phase, number, len(self.phases))
            await self._phase(phase, left)

    def _measured(self) -> set[str]:
        """The cells that are on disk, without those whose server had died: they are begun again."""
        dead = {(row.get("cell"), row.get("attempt")) for row in self.folder.of("phase")}
        rows = self.folder.of("cell")
        return {row["cell"] for row in rows if (row["cell"], row["attempt"]) not in dead}

    def _leave_out(self, phase: Phase) -> None:
        known = {row["cell"] for row in self.folder.of("skipped")}
        for cell, why in phase.skipped:
            if cell.id not in known:
                self.folder.write("skipped", gate=phase.gate.name, cell=cell.id, why=why)

    def _state(self, gate: Gate, state: str, why: str = "", **more: Any) -> None:
        self.folder.write("phase", gate=gate.name, state=state, why=why, **more)

    def _ended(self, gate: Gate) -> bool:
        phases = self.folder.of("phase", gate=gate.name)
        return bool(phases) and phases[-1]["state"] == "ended" and not phases[-1]["why"]

    async def _phase(self, phase: Phase, cells: list[Cell]) -> None:
        guarded = WORKLOADS[phase.gate.workload].guarded
        if guarded and (why := await self.guard(phase.gate)):
            why = f"the server did not generate before it: {why}"
            self.display.say(f"  not run: {why}")
            self._state(phase.gate, "not run", why)
            self.display.dropped(sum(cell.weight for cell in cells))
            return
        self._state(phase.gate, "started")
        why, dead = "", {}
        for number, cell in enumerate(cells, 1):
            alive = await self._cell(phase.gate, cell)
            if not alive and guarded and (fault := await self.guard(phase.gate)):
                why = f"the server stopped generating in {cell.id}: {fault}"
                dead = {"cell": cell.id, "attempt": self._attempts(cell)}
                self.display.say(f"  {why}")
                self.display.dropped(sum(one.weight for one in cells[number:]))
                break
        self._state(phase.gate, "ended", why, **dead)

    def _attempts(self, cell: Cell) -> int:
        return len(self.folder.of("begin", cell=cell.id))

    async def _cell(self, gate: Gate, cell: Cell) -> bool:
        """Measure one cell; false where no request of it came to a good end."""
        attempt = self._attempts(cell) + 1
        self.folder.write("begin", gate=gate.name, cell=cell.id, attempt=attempt)
        self.display.cell(cell)
        session = Session(
            http=self.http,
            server=self.target,
            folder=self.folder,
            gate=gate,
            cell=cell,
            attempt=attempt,
            seed=self.folder.about["seed"],
            options=self.options,
            lengths=self.lengths,
            profile=self.profile,
            report=self.display.answer,
        )
        error, extra = "", {}
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            extra = await WORKLOADS[gate.workload].measure(session)
        except StackError as problem:
            error = problem.message
        except (ValueError, OSError, httpx.HTTPError) as problem:
            error = f"{type(problem).__name__}: {problem}"
        except Exception as problem:
            # A fault of ours: hours of other rows are worth more than an early end.
            error = f"{type(problem).__name__}: {problem}; {traceback.format_exc(limit=-3)}"
        requests = self.folder.of("request", cell=cell.id, attempt=attempt)
        good = sum(not row["answer"]["fault"] for row in requests)
        self.folder.write(
            "cell",
            gate=gate.name,
            cell=cell.id,
            key=cell.key,
            repeat=cell.repeat,
            attempt=attempt,
            requests=cell.requests,
            status="failed" if error else "measured",
            error=error,
            figures=extra,
            seconds=round(loop.time() - started, 3),
        )
        self.display.done(cell, self._short(requests) | extra, error)
        return bool(good) if requests else not error

    def _short(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        answers = [{**row, "answer": Answer.from_record(row["answer"])} for row in requests]
        return row_figures(waves(answers)) if answers else {}

    async def guard(self, gate: Gate) -> str:
        """Whether the server still generates: empty, or what is wrong after three tries."""
        fault = ""
        for number in range(1, GUARD_TRIES + 1):
            if number > 1:
                await asyncio.sleep(self.guard_wait_s)
            fault = await self._generates()
            self.folder.write("guard", gate=gate.name, number=number, fault=fault)
            if not fault:
                return ""
        return fault

    async def _generates(self) -> str:
        if not await server.healthy(self.http):
            return "it is not healthy"
        request = Request(
            [{"role": "user", "content": "Write the numbers from one to ten."}], max_tokens=16
        )
        body = body_of(self.target, request)
        answer = await client.stream(self.http, body, self.guard_timeouts)
        return f"{answer.fault}: {answer.detail}" if answer.fault else ""
