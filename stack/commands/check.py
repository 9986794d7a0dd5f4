"""``check``: every law of the series."""

from __future__ import annotations

import argparse

from stack.checkout import Checkout


def add_parser(subparsers: argparse._SubParsersAction, name: str) -> None:
    """Add the command."""
    p = subparsers.add_parser(
        name,
        help="hold the series to every law; list every violation",
        description="Hold the series to every law of patches/README.md. One line a law where all "
        "is well; else one line for each violation, and exit status 1.",
    )
    p.add_argument(
        "--release",
        metavar="RELEASE",
        help="hold the series in carried/RELEASE, which `rebase --save` keeps, to the same laws",
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check; 1 where a law is broken or could not be checked."""
    from stack.carried import open_carried
    from stack.checking import check

    checkout = open_carried(args.release) if args.release else Checkout()
    laws = check(checkout)
    for law in laws:
        for line in law.lines:
            print(line)
    broken = sum(len(law.violations) for law in laws)
    if broken:
        print(f"{broken} violations")
    return 1 if any(law.violations or law.skipped for law in laws) else 0
