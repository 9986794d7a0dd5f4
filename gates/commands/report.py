"""``report``: write the tables and the page of a run, or of several variants side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

TEXT = """Write report.md, report.html and receipt.json anew from the rows on disk. Several runs are
variants of one build: their rows stand in one table, under the labels given with --variant."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str) -> None:
    """Add the command's parser."""
    p = subparsers.add_parser(name, help="write the report of runs", description=TEXT)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    p.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to (default: the folder of the one run)"
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write it and say where it is."""
    from gates.report import html, markdown, receipt
    from gates.store import RunFolder
    from stack.errors import StackError

    folders = [RunFolder.read(path) for path in args.runs]
    if len(folders) > 1 and args.out is None:
        raise StackError("--out: name a folder for the report of several runs")
    out = args.out or args.runs[0]
    target = RunFolder(out)
    target.save("report.md", markdown.report(folders))
    target.save("report.html", html.page(folders))
    if len(folders) == 1 and args.out is None:
        receipt.written(folders[0])
    print(f"{out / 'report.md'}\n{out / 'report.html'}")
    return 0
