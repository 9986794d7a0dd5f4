"""``export``: the work tree's commits as the series."""

from __future__ import annotations

import argparse
from pathlib import Path

from stack.checkout import Checkout


def add_parser(subparsers: argparse._SubParsersAction, name: str) -> None:
    """Add the command's options."""
    p = subparsers.add_parser(
        name,
        help="write the work tree's commits to patches/",
        description="Write the commits above `base` to patches/, one patch a commit, in a form "
        "that does not depend on who exports. Updates patches/series and upstream.toml.",
    )
    p.add_argument(
        "--from",
        dest="work_tree",
        type=Path,
        metavar="DIR",
        help="the work tree (default: .build/vllm)",
    )
    for folder in ("extra", "core"):
        p.add_argument(
            f"--{folder}",
            action="append",
            default=[],
            metavar="NAME",
            help=f"put the patch with this file name into {folder}/ (may be repeated)",
        )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Export, and say which patches changed."""
    from stack.exporting import export_series

    done = export_series(args.work_tree, checkout=Checkout(), extra=args.extra, core=args.core)
    for name in done.written:
        print(f"written  patches/{name}")
    for name in done.removed:
        print(f"removed  patches/{name}")
    for note in done.notes:
        print(f"note: {note}")
    same = len(done.patches) - len(done.written)
    print(f"{len(done.patches)} patches: {len(done.written)} written, {same} unchanged")
    if done.patched_tree:
        print(f"tree after the series: {done.patched_tree}")
