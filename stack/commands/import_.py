"""``import``: the series as commits in a git work tree."""

from __future__ import annotations

import argparse
from pathlib import Path

from stack.checkout import Checkout


def add_parser(subparsers: argparse._SubParsersAction, name: str) -> None:
    """Add the command's options."""
    p = subparsers.add_parser(
        name,
        help="make a git work tree of the pinned vLLM with the series as commits",
        description="Make a git work tree of the pinned vLLM release with one commit a patch. The "
        "tag `base` there is the release; edit, commit, and run `export`.",
    )
    p.add_argument("--to", type=Path, metavar="DIR", help="the work tree (default: .build/vllm)")
    p.add_argument(
        "--upto",
        metavar="PATCH",
        help="the last patch to import, such as core/NAME.patch; `base` for none",
    )
    p.add_argument(
        "--force",
        action="store_true",
        help="replace work that was not exported (kept in git's stash and on a branch kept-ID)",
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Import, showing each patch's name as it applies."""
    from stack.importing import import_series

    checkout = Checkout()
    made = import_series(
        args.to,
        checkout=checkout,
        upto=args.upto,
        force=args.force,
        echo=lambda line: print(line, flush=True),
    )
    print(
        f"{made.path}: vLLM {checkout.pin.version} and {len(made.patches)} patches, "
        f"head {made.head[:12]}, release's commit tagged `base`"
    )
