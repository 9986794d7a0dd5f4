"""The parts of ring 0: what each proves, and which environment it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["lint", "checks", "wheel", "gates", "suite"]


@dataclass(frozen=True)
class Part:
    """One row of the closing table.

    ``kind`` says how it runs. ``lint``: ruff. ``checks``: pytest of ``tests/NAME`` with the stack
    tool's requirements. ``wheel``: pytest of ``tests/NAME`` with the wheel installed. ``gates``:
    pytest of ``tests/NAME`` with the validation suite's requirements; the wheel's environment lies
    beside it. ``suite``: upstream's own tests with the wheel installed.
    ``minutes``: about what it takes beside another part on two cores; the longest starts first, so
    that it is not alone at the end. ``spread``: over the cores, where no GPU has to be shared.
    """

    name: str
    kind: Kind
    minutes: int
    proves: str
    spread: bool = False


PARTS = (
    Part("lint", "lint", 0, "ruff finds nothing, and the code is formatted"),
    Part("repo", "checks", 0, "the repository keeps its own rules"),
    Part("rings", "checks", 0, "this runner tells a failure from a pass"),
    Part("workflows", "checks", 0, "the GitHub workflows are valid, and what they call exists"),
    Part("stack", "checks", 4, "the laws of the patch series, and the tool that keeps them"),
    Part(
        "wheel", "checks", 2, "the wheel is whole and repeatable; what must be refused is refused"
    ),
    Part("upstream", "checks", 1, "each touched file has its upstream tests named; the comparison"),
    Part("dispatch", "wheel", 7, "every patched function is inert where it must be"),
    Part(
        "kernels",
        "wheel",
        9,
        "every operation equals its definition; every kernel fits SM12x",
        spread=True,
    ),
    Part("checkpoint", "wheel", 1, "made checkpoints load, whole, through vLLM's own loader"),
    Part("oracle", "wheel", 1, "an independent implementation reads them; how runs are compared"),
    Part("engine", "wheel", 11, "the tools of the engine's run on a GPU"),
    Part("serving", "wheel", 6, "vLLM's server answers, refuses, cancels, dies and starts again"),
    Part(
        "gates", "gates", 2, "the validation suite measures what was played, whatever a server does"
    ),
    Part("upstream-suite", "suite", 2, "upstream's CPU tests: none worse than with its own wheel"),
)
NAMES = tuple(part.name for part in PARTS)
