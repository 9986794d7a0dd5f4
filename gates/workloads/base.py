"""What every workload is: parameters, the cells that follow from them, how one is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator

from gates import figures
from gates.answer import Answer
from gates.figures import Figures
from gates.session import Cell, Session
from gates.spec import Gate
from gates.toml import Strict


def _once(values: list[int]) -> list[int]:
    """As it is; a number given twice would be one row, and would stand for two."""
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"each may be there once; twice or more: {', '.join(map(str, twice))}")
    return values


# Numbers that make a row each.
RowNumbers = Annotated[list[int], AfterValidator(_once)]


class Workload(ABC):
    """One kind of load.

    Attributes:
        Params: The model of a gate file's ``params``.
        KEYS: The names in a row's key.
        FIGURES: The figures that a row can have.
    """

    Params: ClassVar[type[Strict]]
    KEYS: ClassVar[frozenset[str]]
    FIGURES: ClassVar[frozenset[str]]
    # Whether the server must generate before it; the first request after a start must come first.
    guarded: ClassVar[bool] = True

    @abstractmethod
    def cells(self, gate: Gate, params: Any) -> list[list[Cell]]:
        """The rows of the gate in the table's order, each with its repeats."""

    @abstractmethod
    async def measure(self, session: Session) -> Figures:
        """Measure one cell and return the figures that do not follow from its answers."""

    def missing(self, params: Any, options: Mapping[str, Any]) -> str | None:
        """Why it cannot run with what the command line gave (data, programs), or None."""
        return None

    def unproven(self, rows: Sequence[Figures]) -> str:
        """Why what was measured proves nothing, so that the gate was not run; empty if it does."""
        return ""

    def row(self, measured: Sequence[Mapping[str, Any]]) -> Figures:
        """The figures of a table row.

        Args:
            measured: One mapping a repeat: ``figures`` that `measure` returned, and ``answers``,
                each with its ``wave``, ``role`` and ``note``.
        """
        total = figures.row([wave for cell in measured for wave in waves(cell["answers"])])
        return total | mean(cell["figures"] for cell in measured)


def waves(answers: Sequence[Mapping[str, Any]]) -> list[list[Answer]]:
    """A cell's answers wave by wave."""
    by_wave: dict[int, list[Answer]] = {}
    for entry in answers:
        by_wave.setdefault(entry["wave"], []).append(entry["answer"])
    return [by_wave[number] for number in sorted(by_wave)]


def mean(repeats: Any) -> Figures:
    """The mean over repeats of figures that are numbers; of others the last that was said."""
    collected: dict[str, list[Any]] = {}
    for repeat in repeats:
        for name, value in repeat.items():
            collected.setdefault(name, []).append(value)
    result: Figures = {}
    for name, values in collected.items():
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        result[name] = sum(numbers) / len(numbers) if len(numbers) == len(values) else values[-1]
    return result
