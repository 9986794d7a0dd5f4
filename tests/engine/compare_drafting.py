"""Whether drafting changes answers: one engine after the other answers the same requests.

    python tests/engine/compare_drafting.py FOLDER --kernels all --lowering sm120
    python tests/engine/compare_drafting.py FOLDER --runs mtp0 mtp2 mtp2-piecewise mtp2-cache

The model is that of run_engine.py, with few tokens that it can answer, so that some drafts are
right. Each run is a process of its own, and what it answered is kept in FOLDER: a run that is there
is not made again, and --seconds ends cleanly before the next one. Needs a CUDA GPU with 40 GB, and
the wheel installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from drafting_judge import BASE, judge
from drafting_runs import FLAGS, Run, run, save
from environment import (
    add_path_options,
    command,
    commit,
    machine,
    memory_options,
    now,
    path_settings,
    prepare,
    settings,
)

DEFAULT_RUNS = (
    BASE,
    "mtp1",
    "mtp1-piecewise",
    "mtp1-drafts",
    "mtp2",
    "mtp2-piecewise",
    "mtp2-drafts",
    "mtp3",
    "mtp3-piecewise",
    "mtp3-drafts",
    "mtp2-eager",
    "mtp2-async",
    "mtp2-unordered",
    "mtp2-cache",
    "mtp2-chunks",
    "mtp2-preempted",
    "mtp2-cache-chunks",
    "mtp2-drafts-cache-chunks",
)


def arguments() -> argparse.Namespace:
    flags = "; ".join(f"{name}: {what}" for name, what in FLAGS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the answers of the runs are kept")
    parser.add_argument(
        "--runs",
        nargs="+",
        default=list(DEFAULT_RUNS),
        metavar="NAME",
        help=f"mtpN and flags ({flags}). Default: {' '.join(DEFAULT_RUNS)}",
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no run after so many"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    add_path_options(parser)
    args = parser.parse_args()
    if BASE not in args.runs:
        args.runs.insert(0, BASE)
    try:
        for name in args.runs:
            Run.of(name)
        check_kept(args)
    except ValueError as error:
        parser.error(str(error))
    # Others are held against it, and preemption needs to know how many blocks it used.
    args.runs.sort(key=lambda name: name != BASE)
    return args


def check_kept(args: argparse.Namespace) -> None:
    """Only runs of one setting are held against each other.

    Raises:
        ValueError: A run that is kept was made with another; the message says which.
    """
    for name in args.runs:
        if not (args.folder / f"{name}.json").is_file():
            continue
        kept = load(args.folder, name)
        for variable, value in path_settings(args).items():
            if kept[variable] != value:
                raise ValueError(
                    f"{args.folder}: {name} was made with {variable}={kept[variable]}, and "
                    f"{value} is asked for; allowed: a folder for each"
                )


def run_here(args: argparse.Namespace) -> None:
    """The run that ``--one`` names, in this process."""
    import os

    what = Run.of(args.one)
    os.environ.update(what.environment())
    guarded = prepare(args)
    blocks = None
    if "preempted" in what.flags:
        blocks = load(args.folder, BASE)["blocks_used"]
    with tempfile.TemporaryDirectory() as model:
        result = run(args.one, Path(model), memory_options(args), blocks)
    if guarded:
        import tripwire

        result["native_calls"] = sorted(set(tripwire.calls))
    result |= {"date": now(), "commit": args.commit or commit(), "machine": machine(), **settings()}
    save(result, args.folder / f"{args.one}.json")


def load(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def command_of(args: argparse.Namespace, name: str) -> list[str]:
    """The command that makes one run, with the same options."""
    words = [sys.executable, str(Path(__file__).resolve()), str(args.folder), "--one", name]
    words += ["--path", args.path, "--kernels", args.kernels, "--lowering", args.lowering]
    words += ["--memory", str(args.memory)]
    for option in ("operations", "kv_memory", "commit"):
        if (value := getattr(args, option)) is not None:
            words += [f"--{option.replace('_', '-')}", str(value)]
    return words


def make(args: argparse.Namespace) -> list[str]:
    """Make the runs that are not there; the names of those that could not be made."""
    began = time.monotonic()
    failed = []
    for name in args.runs:
        if (args.folder / f"{name}.json").is_file():
            print(f"{name}: there", flush=True)
            continue
        if time.monotonic() - began > args.seconds:
            print(f"{name}: not begun, {args.seconds:.0f} s are over", flush=True)
            failed.append(name)
            continue
        if name != BASE and not (args.folder / f"{BASE}.json").is_file():
            print(f"{name}: not begun, {BASE} is missing", flush=True)
            failed.append(name)
            continue
        log = args.folder / f"{name}.log"
        start = time.monotonic()
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(
                command_of(args, name), stdout=output, stderr=subprocess.STDOUT, check=False
            )
        seconds = time.monotonic() - start
        if done.returncode:
            failed.append(name)
            last = (log.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[-1]
            print(f"{name}: FAILED after {seconds:.0f} s, see {log.name}: {last}", flush=True)
        else:
            print(f"{name}: {seconds:.0f} s", flush=True)
    return failed


def show(args: argparse.Namespace, missing: list[str]) -> int:
    """Print the table and the checks, and keep them as ``report.json``."""
    there = [name for name in args.runs if (args.folder / f"{name}.json").is_file()]
    if BASE not in there:
        print(f"nothing to judge: {BASE} is missing")
        return 1
    runs = {name: load(args.folder, name) for name in there}
    allowed, rows, checks = judge(runs)
    print(
        f"\nnoise of another batch: log-probabilities within {allowed.gap:.3f}, forks within "
        f"{allowed.fork:.3f}; allowed: {allowed.allowed_gap:.3f} and {allowed.allowed_fork:.3f}\n"
    )
    columns = list(rows[0])
    width = max(len(row["run"]) for row in rows)
    print("  ".join(f"{name:>{width if name == 'run' else 12}}" for name in columns))
    for row in rows:
        cells = (f"{row[name]!s:>{width if name == 'run' else 12}}" for name in columns)
        print("  ".join(cells))
    print()
    for check in checks:
        print(f"{'ok  ' if check.holds else 'FAIL'} {check.run}: {check.what}: {check.seen}")
    for name in missing:
        print(f"FAIL {name}: not run")
    report = {
        "command": command("compare_drafting.py", args.folder),
        "noise": {"gap": allowed.gap, "fork": allowed.fork},
        "rows": rows,
        "checks": [vars(check) for check in checks],
        "not_run": missing,
        "runs": {
            name: {key: value for key, value in result.items() if key != "answers"}
            for name, result in runs.items()
        },
    }
    (args.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    held = sum(check.holds for check in checks)
    print(f"{held} checks hold, {len(checks) - held} do not, {len(missing)} runs are missing")
    return 1 if held < len(checks) or missing else 0


def main() -> int:
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.one:
        run_here(args)
        return 0
    return show(args, make(args))


if __name__ == "__main__":
    sys.exit(main())
