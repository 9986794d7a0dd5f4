"""``python -m stack wheel``: make the patched wheel; ``build.sh`` is a front for it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from stack.pin import ROOT


def add_parser(subparsers: argparse._SubParsersAction, name: str) -> None:
    """Add the command to the tool's parser."""
    p = subparsers.add_parser(
        name,
        help="make the patched wheel and its receipt",
        description="Make the patched wheel: upstream's binaries (digest checked), the patched "
        "Python files and vllm_sm12x, with a receipt beside it. No compiler is needed. The names "
        "of the wheels go to standard output.",
    )
    p.add_argument(
        "--arch",
        metavar="ARCH",
        help="x86_64, aarch64 or all; this machine's architecture without it",
    )
    p.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=ROOT / "dist",
        help="where the wheels go (default: dist/ of this checkout)",
    )
    p.add_argument(
        "--source",
        action="store_true",
        help="compile everything from the patched tree with the CUDA toolkit of this machine "
        "(hours, and it fetches from upstream's hosts)",
    )
    p.add_argument(
        "--jobs",
        metavar="N",
        type=int,
        help=f"parallel compilers for --source (default: all {os.cpu_count()} cores)",
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the wheels and print their names, one a line."""
    from stack import wheel
    from stack.errors import StackError

    archs = wheel.architectures(args.arch)
    if args.source:
        from stack import sourcebuild

        made = [sourcebuild.build(archs, args.out, jobs=args.jobs)]
    elif args.jobs is not None:
        raise StackError("--jobs is for --source alone", "leave it out: nothing is compiled")
    else:
        made = wheel.build(archs, args.out)
    for one in made:
        print(one.path)
    return 0
