"""Two runs side by side: each figure with its spread, and whether they differ beyond it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from gates import redaction
from gates.report.format import shown, spread, table
from gates.results import RowResult, results
from gates.spec import Gate, Unit
from gates.store import RunFolder

# Which way is good, by how a figure's name begins. Those of neither are shown without a judgement.
LESS = (
    *("ttft", "tpot", "itl", "e2e", "longest_stall", "slow"),
    *("ready_s", "init_s", "graph_s", "load_s"),
    *("failures", "failed", "errors", "http_5xx", "log_", "aborted", "corrupted", "preemptions"),
    *("difference", "imperfect"),
)
MORE = (
    *("decode", "output_tok_s", "input_tok_s", "fairness", "succeeded"),
    *("acceptance", "hit_share", "cached_share", "kv_cache_tokens"),
    *("recalled", "matched", "exact_match", "same_first", "answer_same"),
    *("score", "selection", "precision", "chain", "restraint", "recovery"),
)
# Of a gate's parts, each with the figures of the whole.
PARTS = ("primary_", "secondary_", "first_turn_", "later_turns_")
WITHIN = "within the spread"
# Two runs of one build whose repeats lie wholly apart by chance: 1 in 3 with two repeats each, 1 in
# 35 with four, 1 in 126 with five.
FEWEST = 4
TOO_FEW = f"fewer than {FEWEST} repeats"


@dataclass
class Difference:
    """One figure of one row in two runs; ``first`` and ``second`` hold median, min, max and n."""

    gate: str
    row: str
    figure: str
    unit: Unit
    first: dict[str, float]
    second: dict[str, float]

    @property
    def ratio(self) -> float | None:
        """The second's median over the first's; None where the first is zero."""
        before = self.first["median"]
        return self.second["median"] / before if before else None

    @property
    def judgement(self) -> str:
        """``better``, ``worse`` or ``differs`` beyond the spread of both, or why it is not said."""
        if self.first["n"] < FEWEST or self.second["n"] < FEWEST:
            return TOO_FEW
        if self.first["min"] <= self.second["max"] and self.second["min"] <= self.first["max"]:
            return WITHIN
        higher = self.second["median"] > self.first["median"]
        bare = self.figure
        for part in PARTS:
            bare = bare.removeprefix(part)
        if bare.startswith(LESS):
            return "worse" if higher else "better"
        if bare.startswith(MORE):
            return "better" if higher else "worse"
        return "differs"


def differences(first: RunFolder, second: RunFolder) -> Iterator[Difference]:
    """The figures that both runs have, in the order of the gates' columns."""
    others = {result.gate.name: result for result in results(second)}
    for result in results(first):
        other = others.get(result.gate.name)
        rows = {json.dumps(row.key): row for row in other.rows} if other else {}
        for row in result.rows:
            mate = rows.get(json.dumps(row.key))
            if mate is not None:
                yield from _of_row(result.gate, row, mate)


def _of_row(gate: Gate, row: RowResult, mate: RowResult) -> Iterator[Difference]:
    name = ", ".join(f"{key} {value}" for key, value in row.key.items())
    for column in gate.columns:
        before, after = row.spread.get(column.figure), mate.spread.get(column.figure)
        if before and after and column.figure not in row.key:
            yield Difference(gate.title, name, column.figure, column.unit, before, after)


def unmatched(first: RunFolder, second: RunFolder) -> list[str]:
    """What one run has and the other lacks: gates, and rows of gates."""

    def names(folder: RunFolder) -> dict[str, None]:
        return {
            f"{result.gate.title}: {json.dumps(row.key)}": None
            for result in results(folder)
            for row in result.rows
        }

    mine, theirs = names(first), names(second)
    return [f"only in the first: {name}" for name in mine if name not in theirs] + [
        f"only in the second: {name}" for name in theirs if name not in mine
    ]


def settings(first: RunFolder, second: RunFolder) -> list[list[str]]:
    """What differs between the runs besides what was measured."""
    rows = []
    for name in ("variant", "size", "made_weights", "serve", "profile", "server", "machine"):
        before, after = first.about.get(name), second.about.get(name)
        if name == "serve":
            before, after = redaction.command(before or []), redaction.command(after or [])
        if isinstance(before, dict) and isinstance(after, dict):
            keys = sorted(before.keys() | after.keys())
            pairs = [(f"{name}.{key}", before.get(key), after.get(key)) for key in keys]
        else:
            pairs = [(name, before, after)]
        rows += [
            [key, str(one), str(other)]
            for key, one, other in pairs
            if one != other and not key.endswith(("url", "answered_before"))
        ]
    return rows


def comparison(first: RunFolder, second: RunFolder) -> str:
    """The comparison as Markdown."""
    found = list(differences(first, second))
    lines = ["# Comparison of two runs", "", f"First: {first.path}. Second: {second.path}.", ""]
    if different := settings(first, second):
        lines += ["What differs besides the figures:", ""]
        lines += [table(["", "First", "Second"], different, [False] * 3), ""]
    told = [one for one in found if one.judgement in ("better", "worse", "differs")]
    lines.append(
        f"{len(found)} figures compared: "
        + ", ".join(
            f"{sum(one.judgement == word for one in found)} {word}"
            for word in ("better", "worse", "differs", WITHIN, TOO_FEW)
        )
        + "."
    )
    lines.append("")
    for title, chosen in (("Beyond the spread", told), ("All figures", found)):
        lines += [f"## {title}", ""]
        lines += [_table(chosen) if chosen else "None.", ""]
    if missing := unmatched(first, second):
        lines += ["## Not compared", "", *(f"* {name}" for name in missing), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(chosen: list[Difference]) -> str:
    return table(
        ["Gate", "Row", "Figure", "First: median (least to most)", "Second", "Second / first", ""],
        [
            [
                one.gate,
                one.row,
                one.figure,
                spread(one.first, one.unit),
                spread(one.second, one.unit),
                shown(one.ratio, "ratio"),
                one.judgement,
            ]
            for one in chosen
        ],
        [False, False, False, True, True, True, False],
    )
