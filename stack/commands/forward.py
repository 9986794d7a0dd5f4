"""``forward``: how the series fares on later releases."""

from __future__ import annotations

import argparse
from pathlib import Path

LATEST = "latest"


def add_parser(subparsers: argparse._SubParsersAction, name: str) -> None:
    """Add the command's options."""
    p = subparsers.add_parser(
        name,
        help="try the series on later releases, a line a patch",
        description="Try each patch on later releases, on what applied before it: applies, applies "
        "with three-way, conflict and where, already upstream. Nothing in the checkout changes. "
        "Exit status: 0 no conflict, 1 an error, 2 wrong usage, 3 a conflict.",
    )
    p.add_argument(
        "releases",
        nargs="+",
        metavar="RELEASE",
        help=f"a release such as 0.23.0, or `{LATEST}`: the package index's newest",
    )
    p.add_argument("--markdown", type=Path, metavar="FILE", help="write the report for people")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the report for machines")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Try the series and report; 3 where a patch is in conflict."""
    import datetime
    import json

    from stack import download, release_index
    from stack.checkout import Checkout
    from stack.errors import StackError
    from stack.forward_report import Report, as_json, describe, markdown, summary
    from stack.forwarding import forward, series_digest
    from stack.shared import write
    from stack.trial import EXIT_CONFLICT, Outcome

    checkout = Checkout()
    pin = checkout.pin
    versions: list[str] = []
    for asked in args.releases:
        version = release_index.newest(pin.project) if asked == LATEST else asked
        if asked == LATEST and version == pin.version:
            print(f"{version} is the pinned release, and the newest: nothing to try")
            continue
        release_index.require(pin.project, version, known=download.releases())
        if not release_index.later(version, pin.version):
            raise StackError(
                f"{version} is not later than the pinned release {pin.version}",
                "name a later one, or `latest`",
            )
        if version not in versions:
            versions.append(version)

    results = forward(
        versions,
        checkout=checkout,
        started=lambda version: print(f"\nvLLM {version}", flush=True),
        tried=lambda line: print(f"  {line.patch}: {describe(line)}", flush=True),
    )
    print()
    for result in results:
        print(summary(result))
    today = datetime.datetime.now(datetime.timezone.utc).date()
    report = Report(today, pin, series_digest(checkout.patches), results)
    if args.markdown:
        write(args.markdown, markdown(report))
    if args.json:
        write(args.json, json.dumps(as_json(report), indent=2) + "\n")
    return EXIT_CONFLICT if any(r.count(Outcome.CONFLICT) for r in results) else 0
