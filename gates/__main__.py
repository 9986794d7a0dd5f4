"""``python -m gates COMMAND``: one module a command, each with ``add_parser`` and ``run``."""

from __future__ import annotations

import argparse
import importlib
import sys

from stack.errors import StackError

TEXT = """Measure how a build serves: the gates of gates/files/ on any OpenAI-compatible server,
with a report whose tables are those that were published."""
EXAMPLE = """example, from the root of the checkout:
  python -m gates doctor --python serve/bin/python
  python -m gates run --profile 2x-rtx-pro-6000 --size short \\
      --url http://127.0.0.1:8000 --out runs/first
  python -m gates compare runs/before runs/after

python -m gates COMMAND --help says more of each command, and gates/README.md of the gates."""
# The order is the order of `--help`.
COMMANDS = {
    "run": "gates.commands.run",
    "plan": "gates.commands.plan",
    "report": "gates.commands.report",
    "compare": "gates.commands.compare",
    "doctor": "gates.commands.doctor",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    0 is done and passed, 1 failed, 2 wrong usage, 3 a gate failed or was not run, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m gates",
        description=TEXT,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    try:
        for name, module in COMMANDS.items():
            importlib.import_module(module).add_parser(subparsers, name)
        args = parser.parse_args(argv)
        return args.run(args) or 0
    except ModuleNotFoundError as error:
        print(f"error: the package {error.name} is not installed", file=sys.stderr)
        print("  -> pip install --require-hashes -r gates/requirements.txt", file=sys.stderr)
        return 1
    except StackError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  -> {error.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
