"""``stats``: the size of the series, a row a patch."""

from __future__ import annotations

import argparse
import json

from stack.checkout import Checkout


def add_parser(subparsers: argparse._SubParsersAction, name: str) -> None:
    """Add the command's options."""
    p = subparsers.add_parser(
        name,
        help="count patches, hunks, changed lines and touched files",
        description="Count hunks, added and removed lines and the files of upstream that are "
        "touched: a row a patch, and the total, where a file counts once.",
    )
    p.add_argument("--json", action="store_true", help="print JSON, with the touched files")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    from stack import stats
    from stack.series import load_series

    series = load_series(Checkout().patches)
    if args.json:
        print(json.dumps(stats.as_json(series), indent=2))
    else:
        print("\n".join(stats.table(series)))
