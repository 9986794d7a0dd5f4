"""``compare``: two runs, figure by figure, with the spread of their repeats."""

from __future__ import annotations

import argparse
from pathlib import Path

TEXT = """Compare two runs: median and spread of every figure, and whether the second is better,
worse, or within the spread of the repeats. The rows must be alike; those that one run lacks are
named."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str) -> None:
    """Add the command's parser."""
    p = subparsers.add_parser(name, help="compare two runs", description=TEXT)
    p.add_argument("first", type=Path, metavar="FIRST", help="a run's folder")
    p.add_argument("second", type=Path, metavar="SECOND", help="another run's folder")
    p.add_argument("--out", type=Path, metavar="FILE", help="write it here instead of printing it")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare."""
    from gates.report.comparison import comparison
    from gates.store import RunFolder

    text = comparison(RunFolder.read(args.first), RunFolder.read(args.second))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
        print(args.out)
    else:
        print(text, end="")
    return 0
