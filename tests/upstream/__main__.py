"""``python -m tests.upstream run|baseline``: our wheel against upstream's, test by test."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

from stack.errors import StackError
from stack.pin import ROOT, load_pin
from tests.rings.outcomes import PASSED
from tests.upstream import added, compare, mapping, suite

FOLDER = ROOT / ".build" / "upstream"
ADDED = ROOT / ".build" / "upstream-added"
REMAKE = "python -m tests.upstream baseline --python PYTHON_WITH_UPSTREAMS_WHEEL"
_VERSIONS = """
import importlib.metadata as m, json, platform
names = ("vllm", "torch", "transformers", "pytest", "pytest-asyncio")
print(json.dumps({"python": platform.python_version(), "machine": platform.machine()}
                 | {name: m.version(name) for name in names}))
"""


def versions(python: Path) -> dict[str, str]:
    """What an environment holds, of what can change an outcome."""
    done = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise StackError(f"{python} has no vLLM to test: {last}", "name it with --python")
    return json.loads(done.stdout)


def make_baseline(python: Path, files: list[str], workers: int) -> int:
    """Run mapped tests with upstream's wheel and write their outcomes to ``baseline.json``.

    Args:
        python: The interpreter of an environment with upstream's wheel.
        files: The test files to run; empty for all, GPU ones too. Others keep what is recorded,
            if it was made with the same versions.
        workers: How many files run at once.
    """
    found = versions(python)
    release = load_pin().version
    if found["vllm"] != release:
        raise StackError(
            f"{python} has vLLM {found['vllm']}, the baseline needs upstream's {release}",
            f"make an environment with vllm=={release} and tests/requirements.txt",
        )
    wanted = mapping.load()
    kept = {}
    if files:
        if unknown := sorted({*files} - {*wanted.cpu, *wanted.gpu}):
            raise StackError(f"map.toml does not list {', '.join(unknown)}", "add it there first")
        before = compare.load_baseline()
        if not found.items() <= before["made"].items():
            raise StackError(
                f"the rest of the baseline was made with {before['made']}, this would be {found}",
                "make the baseline of every file",
            )
        kept = {k: v for k, v in compare.unpack(before["files"]).items() if _file(k) not in files}
    groups = [[file] for file in files] or [*([file] for file in wanted.cpu), wanted.gpu]
    outcomes = kept | suite.run(python, suite.lay_out(FOLDER), groups, workers)
    made = {"date": datetime.date.today().isoformat(), "command": REMAKE} | found
    text = json.dumps({"made": made, "files": compare.pack(outcomes)}, indent=1, sort_keys=True)
    compare.BASELINE.write_text(text + "\n", encoding="utf-8")
    print(f"{compare.BASELINE.relative_to(ROOT)}: {len(outcomes)} tests")
    return 0


def _file(node: str) -> str:
    return node.partition("::")[0]


def run(python: Path, summary: Path | None, workers: int) -> int:
    """Run the CPU tests with our wheel and compare, then the tests that the series adds.

    Returns 1 where a test is worse than with upstream's wheel, or an added one does not pass.
    """
    found = versions(python)
    expected = load_pin().local_version
    if found["vllm"] != expected:
        raise StackError(
            f"{python} has vLLM {found['vllm']}, expected our wheel {expected}",
            "run ./test.sh, or install the wheel from dist/",
        )
    baseline = compare.load_baseline()
    if baseline["made"]["vllm"] != load_pin().version:
        raise StackError(
            f"the baseline is of vLLM {baseline['made']['vllm']}, not {load_pin().version}",
            f"run {REMAKE}",
        )
    wanted = mapping.load()
    ours = suite.run(python, suite.lay_out(FOLDER), [[file] for file in wanted.cpu], workers)
    stock = compare.unpack({file: baseline["files"].get(file, {}) for file in wanted.cpu})
    result = compare.compare(stock, ours)
    for title, lines in (
        ("worse than with upstream's wheel", result.worse),
        (f"not in the baseline (remake it: {REMAKE})", result.unknown),
        ("better than with upstream's wheel", result.better),
    ):
        if lines:
            print(f"\n{title}:")
            print("\n".join(f"  {line}" for line in lines))
    print(
        f"\n{result.passed} pass, {result.not_run} are skipped, {result.failed_in_both} fail with "
        f"both wheels, {len(result.worse)} are worse, {len(result.unknown)} unknown; upstream's "
        f"wheel passes {sum(outcome.result == PASSED for outcome in stock.values())}"
    )
    nodes = added.lay_out(ADDED)
    outcomes = suite.run(python, ADDED, [nodes] if nodes else [])
    not_passed = added.judge(nodes, outcomes)
    passed = sum(outcome.result == PASSED for outcome in outcomes.values())
    print("".join(f"  {line}\n" for line in not_passed), end="")
    print(f"{passed} tests pass that the series adds, {len(not_passed)} do not")
    if summary:
        counts = {
            "passed": result.passed + passed,
            "failed": len(result.worse) + len(result.unknown) + len(not_passed),
            "skipped": result.not_run + result.failed_in_both,
        }
        summary.write_text(json.dumps(counts) + "\n", encoding="utf-8")
    return 0 if result.holds and not not_passed else 1


def main() -> int:
    """Parse the command line and run; an error is one line and what to do."""
    parser = argparse.ArgumentParser(prog="python -m tests.upstream", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "run the CPU tests with our wheel, compare, and run the tests that patches add"),
        ("baseline", "run every mapped test with upstream's wheel and write the baseline"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "--python", type=Path, required=True, help="of the environment to test"
        )
        command.add_argument("--workers", type=int, default=2, help="files at once (default: 2)")
        if name == "baseline":
            command.add_argument("files", nargs="*", help="these test files alone")
        if name == "run":
            command.add_argument("--summary", type=Path, help="write the counts here, as JSON")
    args = parser.parse_args()
    # Resolving links would leave the virtual environment.
    python = args.python.absolute()
    try:
        if args.command == "baseline":
            return make_baseline(python, args.files, args.workers)
        return run(python, args.summary, args.workers)
    except StackError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  -> {error.hint}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
