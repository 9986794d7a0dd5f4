"""``python -m stack COMMAND``: one module a command, each with ``add_parser`` and ``run``."""

from __future__ import annotations

import argparse
import importlib
import sys

from stack.errors import StackError

# The order is the order of `--help`. Command modules import third-party packages inside `run`, so
# that a command which needs none runs on a bare Python.
COMMANDS = {
    "import": "stack.commands.import_",
    "export": "stack.commands.export",
    "check": "stack.commands.check",
    "stats": "stack.commands.stats",
    "rebase": "stack.commands.rebase",
    "forward": "stack.commands.forward",
    "sources": "stack.commands.sources",
    "wheel": "stack.commands.wheel",
    "constraints": "stack.commands.constraints",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    0 is done, 1 failed, 2 wrong usage and 130 interrupted; a command may have more.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m stack", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    try:
        for name, module in COMMANDS.items():
            importlib.import_module(module).add_parser(subparsers, name)
        args = parser.parse_args(argv)
        return args.run(args) or 0
    except StackError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  -> {error.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\ninterrupted: nothing half-made was kept; run the same command again",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
