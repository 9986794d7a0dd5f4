"""The tables of a report, apart from how they are written: headings and cells of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gates.prompts.fit import SLACK_TOKENS, TOLERANCE
from gates.report.format import shown, spread
from gates.results import GateResult, RowResult, expected_of
from gates.spec import Column, Gate, Unit, total_key

# The figures whose spread is shown, in the order of their columns.
UNITS: dict[str, Unit] = {
    "ttft_mean": "s",
    "decode_mean": "tok/s",
    "output_tok_s": "tok/s",
    "input_tok_s": "tok/s",
    "itl_p99": "ms",
}
NAMES = {
    "ttft_mean": "TTFT",
    "decode_mean": "Decode tok/s",
    "output_tok_s": "Output tok/s",
    "input_tok_s": "Input tok/s",
    "itl_p99": "ITL p99",
}


@dataclass
class Table:
    """Headings and rows; ``right`` says which columns hold numbers."""

    heads: list[str]
    rows: list[list[str]]
    right: list[bool]


@dataclass
class Variant:
    """The result of one gate in one run, under the run's label (``MTP=2``)."""

    label: str
    profile: str
    size: str
    result: GateResult


def unasked(gate: Gate) -> str:
    """Of the rates of input and output the one that says nothing in a gate.

    A gate that measures reading has the input's in its table, and answers that are of no interest.
    """
    reads = any(column.figure == "input_tok_s" for column in gate.columns)
    return "output_tok_s" if reads else "input_tok_s"


def value(row: RowResult, column: Column) -> Any:
    """What a column shows of a row: a part of its key, or a figure."""
    return row.key.get(column.figure, row.figures.get(column.figure))


def main_table(variants: Sequence[Variant]) -> Table:
    """The gate's own table; a column says the variant where the runs have one."""
    columns = variants[0].result.gate.columns
    labelled = any(variant.label for variant in variants)
    heads = (["Variant"] if labelled else []) + [column.head for column in columns]
    rows = [
        ([variant.label] if labelled else [])
        + [shown(value(row, column), column.unit) for column in columns]
        for variant in variants
        for row in variant.result.rows
    ]
    right = ([False] if labelled else []) + [column.unit != "text" for column in columns]
    return Table(heads, rows, right)


def _name(row: RowResult, columns: Sequence[Column]) -> list[str]:
    """What tells a row from the others: the key as the gate's columns show it."""
    return [shown(row.key[c.figure], c.unit) for c in columns if c.figure in row.key]


def _name_columns(result: GateResult) -> list[Column]:
    return [
        column
        for column in result.gate.columns
        if any(column.figure in row.key for row in result.rows)
    ]


def spread_table(variant: Variant) -> Table | None:
    """Median and spread over the repeats; None where nothing was repeated."""
    rows = variant.result.rows
    skipped = unasked(variant.result.gate)
    figures = [
        name for name in UNITS if name != skipped and any(name in row.spread for row in rows)
    ]
    if not figures or all(len(row.measured) < 2 for row in rows):
        return None
    columns = _name_columns(variant.result)
    return Table(
        [column.head for column in columns]
        + ["Repeats"]
        + [f"{NAMES[name]}: median (least to most)" for name in figures],
        [
            [
                *_name(row, columns),
                str(len(row.measured)),
                *(spread(row.spread.get(name), UNITS[name]) for name in figures),
            ]
            for row in rows
        ],
        [column.unit != "text" for column in columns] + [True] * (1 + len(figures)),
    )


def positions_table(variant: Variant) -> Table | None:
    """The share of drafts accepted at each position, the mean over the repeats; None without."""
    columns, found = _name_columns(variant.result), []
    for row in variant.result.rows:
        told = [one["figures"].get("acceptance_by_position") for one in row.measured]
        if told := [one for one in told if one]:
            # Repeats of one server draft equally far.
            found.append((row, [fmean(shares) for shares in zip(*told, strict=False)]))
    if not found:
        return None
    most = max(len(shares) for _, shares in found)
    return Table(
        [column.head for column in columns] + [f"Position {number}" for number in range(most)],
        [
            _name(row, columns)
            + [shown(share, "percent") for share in shares]
            + [shown(None, "percent")] * (most - len(shares))
            for row, shares in found
        ],
        [column.unit != "text" for column in columns] + [True] * most,
    )


def length_notes(variant: Variant) -> list[str]:
    """What the table's prompt lengths do not hold: prompts uncounted, or of another length."""
    entries = [
        entry
        for row in variant.result.rows
        if row.key != total_key(row.key)  # its parts are rows of their own
        for one in row.measured
        for entry in one["answers"]
        if entry["answer"].chunks and "counted_tokens" in entry["note"]
    ]
    lengths = [
        (entry["answer"].prompt_tokens or entry["note"]["counted_tokens"], entry["note"])
        for entry in entries
    ]
    told = []
    if uncounted := sum(got is None for got, _ in lengths):
        told.append(
            f"Nothing counted the tokens of {uncounted} of {len(lengths)} prompts (no /tokenize "
            "and no usage): their length is an estimate."
        )
    asked: dict[int, list[int]] = {}
    for got, note in lengths:
        if got is not None and note.get("wanted_tokens"):
            asked.setdefault(note["wanted_tokens"], []).append(got)
    for wanted, sizes in sorted(asked.items()):
        allowed = max(SLACK_TOKENS, round(TOLERANCE * wanted))
        if wrong := sorted(got for got in sizes if abs(got - wanted) > allowed):
            told.append(
                f"{len(wrong)} of {len(sizes)} prompts of {wanted:,} tokens had {_range(wrong)}, "
                f"off by more than {TOLERANCE:.1%}."
            )
    return told


def _range(numbers: list[int]) -> str:
    if numbers[0] == numbers[-1]:
        return f"{numbers[0]:,}"
    return f"{numbers[0]:,} to {numbers[-1]:,}"


def unpublished(variant: Variant) -> str:
    """That nobody published a figure for these rows on this hardware; empty where one was."""
    if variant.size != "full" or not variant.result.rows or expected_table(variant):
        return ""
    label = f" and the variant {variant.label}" if variant.label else ""
    return f"No published figure for the profile {variant.profile}{label}."


def expected_table(variant: Variant) -> Table | None:
    """Measured beside expected; None where nobody measured these rows on this hardware.

    The short size loads the server otherwise and has nothing to be held against.
    """
    if variant.size != "full":
        return None
    columns, rows = _name_columns(variant.result), []
    units = {column.figure: column.unit for column in variant.result.gate.columns}
    for row in variant.result.rows:
        for one in expected_of(variant.result.gate, row, variant.profile, variant.label):
            for figure, wanted in one.figures.items():
                got, unit = row.figures.get(figure), units.get(figure, "number")
                ratio = f"{got / wanted:.3f}" if isinstance(got, int | float) and wanted else "-"
                rows.append(
                    [
                        *_name(row, columns),
                        figure,
                        shown(got, unit),
                        shown(wanted, unit),
                        ratio,
                        one.source,
                    ]
                )
    if not rows:
        return None
    heads = [column.head for column in columns]
    return Table(
        [*heads, "Figure", "Measured", "Expected", "Measured / expected", "Source"],
        rows,
        [column.unit != "text" for column in columns] + [False, True, True, True, False],
    )
