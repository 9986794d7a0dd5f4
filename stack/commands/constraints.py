"""``python -m stack constraints``: make or check the locks under ``constraints/``."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction, name: str) -> None:
    """Add the command to the tool's parser."""
    p = subparsers.add_parser(
        name,
        help="make the locks of what the wheel runs with, or check them",
        description="Resolve what the pinned vLLM runs with, for each Python and architecture, as "
        "of the date in upstream.toml, and write the locks to constraints/.",
    )
    p.add_argument(
        "--check", action="store_true", help="write nothing; fail where a lock would change"
    )
    p.add_argument(
        "--tool",
        metavar="YYYY-MM-DD",
        help="instead of constraints/: lock the tool's own requirements as of this date",
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write or compare every lock."""
    from stack import locks
    from stack.errors import StackError
    from stack.pin import load_pin

    pin = load_pin()
    if args.tool:
        wanted = [(locks.TOOL_LOCK, locks.resolve_tool(args.tool))]
    else:
        wanted = locks.all_locks(pin)
        for stray in locks.strays(pin):
            raise StackError(
                f"{stray.name} is for a Python that upstream.toml does not name", "remove it"
            )
    changed = []
    for path, text in wanted:
        lines = locks.differences(path, text)
        if not lines:
            print(f"{path.name}: as it should be")
            continue
        changed.append(path.name)
        print(f"{path.name}: {len(lines)} lines differ")
        if args.check:
            for line in lines:
                print(f"  {line}", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if args.check and changed:
        raise StackError(
            f"locks that would change: {', '.join(changed)}",
            "run `python -m stack constraints`, and look at what changed",
        )
    return 0
