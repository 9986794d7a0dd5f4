"""``plan``: what a run would do, without a server."""

from __future__ import annotations

import argparse

from gates.commands import options

TEXT = "Print every gate with its rows, repeats, requests and prompt tokens; nothing is sent."


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str) -> None:
    """Add the command's parser."""
    p = subparsers.add_parser(name, help="print what a run would do", description=TEXT)
    options.add_selection(p)
    options.add_data(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from gates.plan import plan

    profile = options.selected_profile(args)
    show(plan(options.selected_gates(args), args.size, profile, None, options.data(args)))
    return 0


def show(phases: list) -> None:
    """Print phases as a table, each row of a gate a line."""
    from rich.console import Console
    from rich.table import Table

    from gates.progress import counted

    table = Table("gate", "row", "repeats", "requests", "longest prompt + answer", "not run: why")
    for phase in phases:
        if phase.why_not:
            table.add_row(phase.gate.name, "", "", "", "", phase.why_not)
            continue
        left_out = {cell.id: why for cell, why in phase.skipped}
        for row in phase.rows:
            first = row[0]
            said = " ".join(f"{key}={value}" for key, value in first.key.items())
            table.add_row(
                phase.gate.name,
                said,
                str(len(row)),
                str(sum(cell.requests for cell in row)),
                f"{first.longest:,}" if first.longest else "",
                left_out.get(first.id, ""),
            )
        table.add_section()
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    cells = sum(len(phase.cells) for phase in phases)
    requests = sum(phase.requests for phase in phases)
    numbers = ((len(phases), "gate"), (cells, "cell"), (requests, "request"))
    console.print(", ".join(counted(*one) for one in numbers), highlight=False)
