"""The report as Markdown, its tables column by column as the gate files name them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gates.report import format
from gates.report.receipt import facts, notes
from gates.report.tables import (
    Table,
    Variant,
    expected_table,
    length_notes,
    main_table,
    positions_table,
    spread_table,
    unpublished,
)
from gates.results import results
from gates.store import RunFolder


def report(folders: Sequence[RunFolder]) -> str:
    """The report of one run, or of several variants of one build side by side."""
    by_gate = variants(folders)
    lines = ["# Validation report", ""]
    for folder in folders:
        lines += [_table(Table(["", ""], facts(folder), [False, False])), ""]
        lines += [line for note in notes(folder) for line in (note, "")]
    lines += ["## Gates", "", _table(_overview(by_gate)), ""]
    for several in by_gate.values():
        lines += _gate(several)
    return "\n".join(lines).rstrip() + "\n"


def variants(folders: Sequence[RunFolder]) -> dict[str, list[Variant]]:
    """The results of runs by gate."""
    by_gate: dict[str, list[Variant]] = {}
    for folder in folders:
        about = folder.about
        for result in results(folder):
            by_gate.setdefault(result.gate.name, []).append(
                Variant(about.get("variant", ""), about["profile"]["name"], about["size"], result)
            )
    return by_gate


def _overview(by_gate: dict[str, list[Variant]]) -> Table:
    rows = []
    for several in by_gate.values():
        for variant in several:
            result = variant.result
            why = result.why[0] if result.why else ""
            more = f" (and {len(result.why) - 1} more)" if len(result.why) > 1 else ""
            rows.append([result.gate.title, variant.label, result.status, why + more])
    return Table(["Gate", "Variant", "Verdict", "Why"], rows, [False] * 4)


def _gate(several: Sequence[Variant]) -> list[str]:
    gate = several[0].result.gate
    lines = [f"## {gate.title}", "", gate.why, ""]
    if any(variant.result.rows for variant in several):
        lines += [_table(main_table(several)), ""]
    for variant in several:
        if told := length_notes(variant):
            lines += [f"Prompt lengths{_of(variant)}:", "", *(f"* {one}" for one in told), ""]
    for variant in several:
        label = _of(variant)
        lines.append(f"Verdict{label}: **{variant.result.status}**.")
        lines += [""] + [f"* {line}" for line in variant.result.why] if variant.result.why else []
        lines.append("")
        for title, listed in (
            ("Warnings", variant.result.warnings),
            ("Left out", variant.result.left_out),
        ):
            if listed:
                lines += [f"{title}:", "", *(f"* {line}" for line in listed), ""]
        for title, made in (
            ("Acceptance by position of the draft", positions_table(variant)),
            ("Over the repeats", spread_table(variant)),
            ("Against what was measured before", expected_table(variant)),
        ):
            if made:
                lines += [f"{title}{label}:", "", _table(made), ""]
        if told := unpublished(variant):
            lines += [told, ""]
    return lines


def _of(variant: Variant) -> str:
    return f" ({variant.label})" if variant.label else ""


def _table(made: Table) -> str:
    return format.table(made.heads, made.rows, made.right)


def written(folder: RunFolder, **kept: Any) -> str:
    """The report of one run, saved in its folder as ``report.md``."""
    text = report([folder])
    folder.save("report.md", text)
    return text
