"""``./test.sh``: make the environments, run the parts, print where the rings stand."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from stack.errors import StackError
from tests.rings import environment, running
from tests.rings.parts import NAMES, PARTS, Part
from tests.rings.report import Result, clock, closing_line, table
from tests.rings.running import OUTCOMES, Selection

GPU_PARTS = ("kernels", "dispatch", "engine", "serving")
_GPU = """
import json, torch
if torch.cuda.is_available():
    print(json.dumps([torch.cuda.get_device_name(), torch.cuda.get_device_capability()]))
"""


def parser() -> argparse.ArgumentParser:
    """The command line of ``./test.sh``."""
    p = argparse.ArgumentParser(
        prog="./test.sh",
        description="Run ring 0, the tests that need no GPU, in environments made for it; then say "
        "where ring 1 (any CUDA GPU) and ring 2 (SM12x) stand.",
        epilog="Arguments after -- go to pytest. Parts: " + ", ".join(NAMES) + ".",
    )
    p.add_argument(
        "--ring", type=int, choices=(0, 1), default=0, help="1: the tests that need a CUDA GPU"
    )
    p.add_argument(
        "--only", action="append", choices=NAMES, metavar="PART", help="this part alone; repeatable"
    )
    p.add_argument(
        "-k", default="", metavar="EXPR", help="pytest's -k; parts with no match are left"
    )
    p.add_argument(
        "--python",
        type=Path,
        metavar="PYTHON",
        help="test the wheel in this interpreter's environment as it is, and make none: for a "
        "machine without a network; the parts that need the wheel alone",
    )
    p.add_argument("--list", action="store_true", help="list the parts and what each proves")
    p.add_argument("pytest", nargs="*", metavar="-- ARG", help="further arguments of pytest")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 passed, 1 failed, 2 wrong usage, 130 interrupted."""
    args = parser().parse_args(argv)
    if args.list:
        for part in PARTS:
            print(f"{part.name:15} {part.proves}")
        return 0
    try:
        return _run(args)
    except StackError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  -> {error.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    chosen = [part for part in PARTS if not args.only or part.name in args.only]
    if args.ring == 1:
        chosen = [part for part in chosen if part.name in GPU_PARTS]
    elif args.python:
        chosen = [part for part in chosen if part.kind == "wheel"]
    elif args.k and not args.only:
        chosen = [part for part in chosen if part.kind in ("checks", "wheel", "gates")]
    if not chosen:
        raise StackError(
            f"none of {', '.join(args.only)} is run by this", f"what is: {', '.join(GPU_PARTS)}"
        )
    selection = Selection(args.k, "gpu" if args.ring else "", tuple(args.pytest))
    if args.python:
        # Resolving links would leave the virtual environment.
        selection = replace(selection, python=args.python.absolute())
    else:
        _prepare({part.kind for part in chosen})
    results = (_ring_1 if args.ring == 1 else _ring_0)(chosen, selection)
    print(f"\nring {args.ring}\n\n{table(results)}\n")
    whole = len(chosen) == len(PARTS) and not selection.narrowed
    print(_standing(args.ring, results, whole, _gpu(selection.python)))
    print(f"total time {clock(time.monotonic() - started)}\n")
    print(closing_line(results))
    if not results:
        print("error: no test was selected", file=sys.stderr)
    return 0 if results and all(result.ok for result in results) else 1


def _step(title: str, work: Callable[[], object]) -> object:
    print(f"== {title} ...", flush=True)
    started = time.monotonic()
    done = work()
    said = f": {done}" if isinstance(done, str) else ""
    print(f"== {title}{said} [{clock(time.monotonic() - started)}]", flush=True)
    return done


def _prepare(kinds: set[str]) -> None:
    """Make the environments that these kinds of part need."""
    interpreter = environment.running()
    tools = _step("tool environment .venv", environment.make_tools)
    uv = Path(str(tools)).with_name("uv")
    if kinds & {"lint", "checks", "suite"}:
        _step(
            "check environment .build/check-env",
            lambda: environment.make_check_env(interpreter, uv),
        )
    if "gates" in kinds:
        _step(
            "suite environment .build/gates-env",
            lambda: environment.make_gates_env(interpreter, uv),
        )
    if kinds & {"wheel", "suite", "gates"}:
        arch = environment.architecture()
        lock = environment.lock_for(interpreter, arch)
        wheel = _step("the wheel", lambda: environment.build_wheel(interpreter, arch))
        assert isinstance(wheel, Path)
        _step(
            "test environment .build/test-env",
            lambda: environment.make_test_env(interpreter, uv, lock, wheel),
        )


def _ring_0(chosen: Sequence[Part], selection: Selection) -> list[Result]:
    if len(chosen) == 1:
        result = running.run_part(chosen[0], selection, log=None)
        return [result] if result else []
    # Two at a time: most parts wait for imports and child processes. The longest starts first.
    order = sorted(chosen, key=lambda part: -part.minutes)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda part: _run_logged(part, selection), order))
    by_name = {result.name: result for result in done if result}
    return [by_name[part.name] for part in chosen if part.name in by_name]


def _run_logged(part: Part, selection: Selection) -> Result | None:
    log = OUTCOMES / f"{part.name}.txt"
    OUTCOMES.mkdir(parents=True, exist_ok=True)
    result = running.run_part(part, selection, log)
    if result is None:
        return None
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    shown = "" if result.ok else f"\n{text}\n"
    print(
        f"{shown}== {part.name}: {closing_line([result])} [{clock(result.seconds)}]"
        f"{'' if result.ok else '  FAILED ' + result.problem}",
        flush=True,
    )
    return result


def _ring_1(chosen: Sequence[Part], selection: Selection) -> list[Result]:
    gpu = _gpu(selection.python)
    if gpu is None:
        raise StackError(
            "ring 1 needs a CUDA GPU, and torch sees none", "run it on a machine that has one"
        )
    print(f"== GPU: {gpu[0]}, compute capability {gpu[1][0]}.{gpu[1][1]}", flush=True)
    results = []
    for part in chosen:
        result = running.run_part(part, selection, log=None, gpu=True)
        if result:
            results.append(result)
    return results


def _gpu(python: Path) -> tuple[str, tuple[int, int]] | None:
    """The name and compute capability of the first GPU that an interpreter's torch sees."""
    if not python.exists():
        return None
    done = subprocess.run([python, "-c", _GPU], capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        return None
    name, capability = json.loads(done.stdout)
    return name, tuple(capability)


def _standing(
    ring: int, results: Sequence[Result], whole: bool, gpu: tuple[str, tuple[int, int]] | None
) -> str:
    """Where each ring stands after this run, and the command that runs what was not run."""
    ok = bool(results) and all(result.ok for result in results)
    ran = ("passed" if ok else "FAILED") + ("" if whole or ring else ", in part")
    if ring == 1:
        first = "not run now; run it: ./test.sh"
        second = ran
    else:
        first = ran
        seen = f"this machine has {gpu[0]}" if gpu else "no CUDA GPU here; on a machine with one"
        second = f"not run: {seen}: ./test.sh --ring 1"
    if gpu and gpu[1][0] == 12:
        third = f"not run: this machine has {gpu[0]}; gates/README.md says how"
    else:
        third = "not run: needs an SM12x GPU (compute capability 12.0 or 12.1); gates/README.md"
    return (
        f"ring 0 (no GPU):        {first}\n"
        f"ring 1 (any CUDA GPU):  {second}\n"
        f"ring 2 (SM12x, gates/): {third}\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
