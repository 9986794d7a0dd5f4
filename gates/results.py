"""From a run's rows to what each gate came to: figures with spread, and the verdict."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from gates.answer import Answer
from gates.figures import Figures, repeated
from gates.spec import Expected, Gate, Threshold, total_key
from gates.store import RunFolder
from gates.workloads import WORKLOADS

Status = Literal["passed", "failed", "not run"]


@dataclass
class RowResult:
    """One row of a gate's table.

    ``spread`` holds, for each figure, its median, smallest and largest value over the repeats.
    ``measured`` has one entry a repeat, as `Workload.row` takes it.
    """

    key: dict[str, Any]
    figures: Figures
    spread: dict[str, dict[str, float]]
    measured: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class GateResult:
    """What a gate came to. ``why`` says why it did not pass, or was not run, a line each."""

    gate: Gate
    status: Status
    rows: list[RowResult]
    why: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def results(folder: RunFolder) -> list[GateResult]:
    """Every gate of a run, in its order."""
    gates = [Gate.model_validate(kept) for kept in folder.about["gates"]]
    return [of_gate(folder, gate) for gate in gates]


def of_gate(folder: RunFolder, gate: Gate) -> GateResult:
    """What one gate came to."""
    rows: dict[str, list[dict[str, Any]]] = {}
    problems: list[str] = []
    # Of a cell that was measured again the last attempt counts; the others stay in the file.
    cells = {cell["cell"]: cell for cell in folder.of("cell", gate=gate.name)}
    for cell in cells.values():
        if cell["status"] == "measured":
            entry = {"figures": cell["figures"], "answers": _answers(folder, cell), "cell": cell}
            rows.setdefault(json.dumps(cell["key"]), []).append(entry)
        else:
            problems.append(f"{cell['cell']}: {cell['error']}")
    workload, profile = WORKLOADS[gate.workload], folder.about["profile"]["name"]
    made_up = folder.about.get("made_weights", False)
    judged = [threshold for threshold in gate.thresholds if not (made_up and threshold.content)]
    found = []
    for key, measured in rows.items():
        measured.sort(key=lambda entry: entry["cell"]["repeat"])
        row = RowResult(
            json.loads(key),
            workload.row(measured),
            repeated(workload.row([one]) for one in measured),
            measured,
        )
        for threshold in judged:
            judge(row, threshold, profile)
        found.append(row)
    order = folder.about["order"].get(gate.name, [])
    found.sort(key=lambda row: order.index(row.key) if row.key in order else len(order))
    if gate.total and found:
        everything = [one for row in found for one in row.measured]
        found.append(RowResult(total_key(found[0].key), workload.row(everything), {}, everything))
        for threshold in judged:
            judge(found[-1], threshold, profile)
    skipped = [f"{row['cell']}: {row['why']}" for row in folder.of("skipped", gate=gate.name)]
    phases = folder.of("phase", gate=gate.name)
    last = phases[-1] if phases else {"state": "not run", "why": "the run ended before it"}
    result = GateResult(gate, "passed", found, left_out=_once(skipped))
    result.warnings = [warning for row in found for warning in row.warnings]
    for threshold in gate.thresholds:
        if threshold not in judged:
            result.warnings.append(f"{threshold.figure}: not judged, the weights are made up")
    result.why = problems + [problem for row in found for problem in row.problems]
    if last["state"] == "not run":
        result.why = [last["why"], *result.why]
        result.status = "failed" if result.why[1:] else "not run"
    elif last["state"] == "started":
        result.why.append("it was interrupted before its end")
        result.status = "failed" if result.why[:-1] else "not run"
    elif last.get("why"):
        result.why.append(last["why"])
        result.status = "failed"
    elif result.why:
        result.status = "failed"
    elif not found:
        result.why, result.status = ["nothing was measured"], "not run"
    elif unproven := workload.unproven([row.figures for row in found]):
        result.why, result.status = [unproven], "not run"
    return result


def _once(lines: list[str]) -> list[str]:
    return list(dict.fromkeys(lines))


def _answers(folder: RunFolder, cell: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of a cell's attempt that came to its end; of an interrupted one, none."""
    return [
        {**row, "answer": Answer.from_record(row["answer"])}
        for row in folder.of("request", cell=cell["cell"], attempt=cell["attempt"])
    ]


def applies(where: dict[str, Any], row: RowResult) -> bool:
    """Whether a row is one of those that ``where`` names."""
    return all(row.key.get(name) == value for name, value in where.items())


def judge(row: RowResult, threshold: Threshold, profile: str) -> None:
    """Hold a row to a threshold; what it breaks is noted in the row."""
    if threshold.profile not in (None, profile) or not applies(threshold.where, row):
        return
    value = row.figures.get(threshold.figure)
    name = " ".join(f"{key}={value}" for key, value in row.key.items())
    if value is None and threshold.optional:
        return
    if value is None:
        said = f"{name}: {threshold.figure} could not be measured"
    elif threshold.min is not None and value < threshold.min:
        said = f"{name}: {threshold.figure} is {value:.4g}, below {threshold.min:g}"
    elif threshold.max is not None and value > threshold.max:
        said = f"{name}: {threshold.figure} is {value:.4g}, above {threshold.max:g}"
    else:
        return
    said = f"{said} ({threshold.why})"
    (row.problems if threshold.level == "fail" else row.warnings).append(said)


def expected_of(gate: Gate, row: RowResult, profile: str, variant: str) -> list[Expected]:
    """What somebody measured for this row on this hardware."""
    return [
        one
        for one in gate.expected
        if one.profile == profile and one.variant in ("", variant) and applies(one.where, row)
    ]
