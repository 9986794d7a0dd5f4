"""What a run shows while it goes: what runs, how long still, and the last figures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

from gates import figures
from gates.answer import Answer
from gates.plan import Phase
from gates.report.format import shown
from gates.session import Cell
from gates.spec import Column

# How many figures of its own table a gate shows that times nothing.
MOST = 4


class Display(AbstractContextManager["Display"]):
    """A bar on a terminal; elsewhere one line a phase and a cell."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            Remaining(elapsed_when_finished=True),
            TextColumn("{task.fields[last]}"),
            console=self.console,
            disable=not self.console.is_terminal,
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

    def answer(self, answer: Answer) -> None:
        """A request ended."""
        self._bar.update(self._task, last=said(figures.of_answer(answer), answer.fault))

    def done(self, cell: Cell, result: dict[str, Any], problem: str) -> None:
        """A cell ended."""
        self._bar.advance(self._task, cell.weight)
        self.say(f"  {cell.id}: {problem or said(result, '', self._columns)}")


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
