"""What a run shows while it goes: what runs, how long still, and the last figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from gates import figures
from gates.answer import Answer
from gates.plan import Phase
from gates.report.format import shown
from gates.session import Cell
from gates.spec import Column

# How many figures of its own table a gate shows that times nothing.
MOST = 4


class Remaining:
    """How long still: the weight that is left, at the pace of what this run has measured.

    rich's own estimate looks back over seconds, and here a step is a cell, which takes minutes.
    What a resumed run has from before took none of its time, so it is no part of the pace.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.left = self.running = self.measured = 0.0
        self.began = self.last = clock()

    def begin(self, left: float) -> None:
        """The run begins, with so much to do."""
        self.left, self.measured = left, 0.0
        self.began = self.last = self.clock()

    def ended(self, weight: float) -> None:
        """A cell ended."""
        self.measured += weight
        self.left, self.running = max(0.0, self.left - weight), 0.0
        self.last = self.clock()

    def seconds(self) -> float | None:
        """Seconds to the end; None before the first cell has ended."""
        if not self.measured:
            return None
        pace = (self.last - self.began) / self.measured
        # A cell that takes longer than expected uses up its own share and not that of the others.
        after = max(0.0, self.left - self.running) * pace
        return max(after, self.left * pace - (self.clock() - self.last))

    def __str__(self) -> str:
        seconds = self.seconds()
        if seconds is None:
            return "time left: not known yet"
        return f"about {timedelta(seconds=round(seconds))} left"


class _RemainingColumn(ProgressColumn):
    """The estimate of a `Remaining` as it is now."""

    def __init__(self, remaining: Remaining) -> None:
        super().__init__()
        self.remaining = remaining

    def render(self, task: Task) -> Text:
        return Text(str(self.remaining), style="progress.remaining")


class Display(AbstractContextManager["Display"]):
    """A bar on a terminal; elsewhere one line a phase and a cell."""

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.remaining = Remaining(clock)
        self.console = console or Console(stderr=True)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            _RemainingColumn(self.remaining),
            TextColumn("{task.fields[last]}"),
            console=self.console,
            disable=not self.console.is_terminal,
            get_time=clock,
        )
        self._task = self._bar.add_task("starting", total=None, last="")
        self._columns: Sequence[Column] = ()

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def total(self, weight: float, done: float) -> None:
        """How much there is in all, and how much of it a resumed run has."""
        self._bar.update(self._task, total=weight, completed=done)
        self.remaining.begin(weight - done)

    def dropped(self, weight: float) -> None:
        """So much of the total will not be measured."""
        task = self._bar.tasks[0]
        self._bar.update(self._task, total=(task.total or weight) - weight)
        self.remaining.left = max(0.0, self.remaining.left - weight)

    def phase(self, phase: Phase, number: int, of: int) -> None:
        """A gate begins."""
        self._columns = phase.gate.columns
        self.say(
            f"[{number}/{of}] {phase.gate.title}: {counted(len(phase.cells), 'cell')}, "
            f"{counted(phase.requests, 'request')}"
        )

    def cell(self, cell: Cell) -> None:
        """A cell begins."""
        self._bar.update(self._task, description=cell.id)
        self.remaining.running = cell.weight

    def answer(self, answer: Answer) -> None:
        """A request ended."""
        self._bar.update(self._task, last=said(figures.of_answer(answer), answer.fault))

    def done(self, cell: Cell, result: dict[str, Any], problem: str) -> None:
        """A cell ended."""
        self._bar.advance(self._task, cell.weight)
        self.remaining.ended(cell.weight)
        # On a terminal the bar says how long still.
        left = "" if self.console.is_terminal else f"; {self.remaining}"
        self.say(f"  {cell.id}: {problem or said(result, '', self._columns)}{left}")


def counted(number: int, what: str) -> str:
    """``1 cell``, ``2 cells``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def said(result: dict[str, Any], fault: str, columns: Sequence[Column] = ()) -> str:
    """The figures that tell most, in one line.

    Where nothing was timed these are the first of ``columns``, the gate's own.
    """
    parts = [f"FAULT {fault}"] if fault else []
    if result.get("failures"):
        parts.append(f"{result['failures']} of {result['requests']} FAILED")
    timed = (
        ("ttft", "TTFT {:.3f} s"),
        ("ttft_mean", "TTFT {:.3f} s"),
        ("decode_tok_s", "{:.1f} tok/s"),
        ("decode_mean", "{:.1f} tok/s"),
        ("output_tok_s", "{:.1f} tok/s in all"),
        ("longest_stall", "longest stall {:.3f} s"),
        ("acceptance_length", "acceptance length {:.2f}"),
    )
    told = [form.format(result[name]) for name, form in timed if name in result]
    if not told:
        own = [column for column in columns if column.figure in result]
        told = [f"{one.head} {shown(result[one.figure], one.unit)}" for one in own[:MOST]]
    return ", ".join(parts + told) or "no figures"
