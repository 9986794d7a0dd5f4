"""``python -m benchmarks.engine``: the engine's speed, end to end, on one path.

    python -m benchmarks.engine --path native --caches native-caches --out engine.jsonl
    python -m benchmarks.engine --path portable --lowering sm120 --caches sm120 --out engine.jsonl
    python -m benchmarks.engine --report engine.jsonl

Starts ``vllm serve`` with the options of README.md on a model of Flash's full width, with MTP=2 and
without prefix cache, measures, and stops it. ``--caches`` names a folder for everything that is
compiled: where it is new the start is a cold one, where it was used before it is a warm one. Every
row is written when it is measured; when ``--budget`` is spent, the rest is left out and said.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.engine import model, startup, tables
from benchmarks.engine.measure import Bench, Budget, Failed, OutOfTime, Plan
from benchmarks.engine.rows import Rows, about, read
from benchmarks.engine.server_plugin.engine_plugin import COMPILE_LOG
from gates import client
from gates.launch import launched
from stack.errors import StackError
from tests.engine.environment import LOWERINGS
from tests.engine.flash_config import LOAD_FORMAT
from tests.serving.options import MODEL_NAME, PATHS, Serve, free_port, variables

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = (ROOT / "benchmarks" / "engine" / "server_plugin", ROOT / "tests" / "engine")
MAX_MODEL_LEN = 131072
# Kept back of the budget for ending the server.
STOP_S = 15.0


def numbers(text: str) -> tuple[int, ...]:
    """``1,4,8``; nothing for an empty text."""
    return tuple(int(one) for one in text.split(",") if one)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    plan = Plan()
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--report", nargs="+", type=Path, metavar="FILE", help="tables of these rows")
    p.add_argument("--path", choices=PATHS, help="what runs the model's operations")
    p.add_argument(
        "--kernels", default="all", help="SM12X_KERNELS of the portable path (default: all)"
    )
    p.add_argument(
        "--lowering", choices=LOWERINGS, default="native", help="of our kernels (default: native)"
    )
    p.add_argument("--layers", type=int, default=5, help="5 to 43 (default: 5)")
    p.add_argument("--tp", type=int, default=1, help="GPUs (default: 1)")
    p.add_argument("--mtp", type=int, default=2, help="drafts a step, 0: none (default: 2)")
    p.add_argument("--caches", type=Path, help="folder of everything compiled; new: a cold start")
    p.add_argument("--out", type=Path, help="append the rows to this file of JSON lines")
    p.add_argument("--log", type=Path, help="keep the server's log in this file")
    p.add_argument("--budget", type=float, default=540.0, help="seconds in all (default: 540)")
    p.add_argument("--start-only", action="store_true", help="the start and the first requests")
    p.add_argument("--ttft", type=numbers, default=plan.ttft, help="lengths of prompts")
    p.add_argument("--concurrency", type=numbers, default=plan.concurrency, help="of decode")
    p.add_argument("--repeats", type=int, default=plan.repeats, help="of each cell (default: 3)")
    p.add_argument(
        "--random", type=numbers, default=(), help="also random 8K/1K at these concurrencies"
    )
    p.add_argument(
        "--requests",
        type=int,
        default=plan.requests,
        help="of random, or as many as run at once (default: 16)",
    )
    p.add_argument(
        "--python", default=sys.executable, help="the Python that serves (default: this)"
    )
    p.add_argument(
        "--profile", type=Path, metavar="FOLDER", help="trace some steps too; the traces go there"
    )
    p.add_argument(
        "--profile-prompts",
        type=numbers,
        default=plan.profile_prompts,
        help="lengths of the prompts that --profile traces (default: 8192)",
    )
    p.add_argument("--memory", type=float, default=0.9, help="share of a GPU's memory")
    p.add_argument("--max-num-seqs", type=int, default=8, help="(default: 8)")
    p.add_argument(
        "--commit",
        help="commit to name in the rows where git cannot tell; with --report: of these rows alone",
    )
    p.add_argument(
        "serve", nargs="*", metavar="-- OPTION", help="further options of vllm serve, after --"
    )
    return p


def checked(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, or the end of the program with what is wrong and what is allowed."""
    p = parser()
    args = p.parse_args(argv)
    if args.report:
        return args
    if args.path is None:
        p.error("--path: allowed: " + ", ".join(PATHS) + "; or --report FILE")
    if args.caches is None:
        p.error("--caches: name a folder; a new one makes the start a cold one")
    try:
        model.compress_ratios(args.layers)
    except ValueError as error:
        p.error(f"--{error}")
    for name, least in (
        ("tp", 1),
        ("mtp", 0),
        ("repeats", 1),
        ("requests", 1),
        ("max_num_seqs", 1),
    ):
        if getattr(args, name) < least:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: allowed: {least} and more")
    if args.budget <= STOP_S:
        p.error(f"--budget {args.budget:g}: allowed: more than {STOP_S:g} seconds")
    if max((*args.concurrency, *args.random), default=1) > args.max_num_seqs:
        p.error(f"--max-num-seqs {args.max_num_seqs}: requests would wait for each other")
    return args


def variant(args: argparse.Namespace) -> str:
    """The name of what is compared: the path, the form of its operations, the lowering.

    A start by fork, which vLLM's server takes when the variable says so, is something else too.
    """
    forms = {"all": "portable", "none": "portable (PyTorch)"}
    name = forms.get(args.kernels, f"portable ({args.kernels})")
    if args.kernels != "none":
        name += f", {args.lowering}"
    if args.path == "native":
        name = "native"
    return name + (", fork" if os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") == "fork" else "")


def _profiler(folder: Path) -> tuple[str, str]:
    """vLLM's option for the torch profiler, with its traces in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return "--profiler-config", json.dumps(
        {
            "profiler": "torch",
            "torch_profiler_dir": str(folder.absolute()),
            "torch_profiler_with_stack": False,
            "ignore_frontend": True,
        }
    )


async def measure(args: argparse.Namespace, rows: Rows, folder: Path) -> int:
    """Start a server, measure, stop it; 0 where everything was measured.

    Args:
        args: The command line.
        rows: Where the rows go.
        folder: For the model and the log of compilations.
    """
    budget = Budget(args.budget - STOP_S)
    vocabulary = model.write_model(folder / "model", args.layers)
    cold = startup.is_cold(args.caches)
    compile_log = folder / "compiled.jsonl"
    log = args.log or folder / "server.log"
    serve = Serve(
        folder / "model",
        free_port(),
        tp=args.tp,
        mtp=args.mtp,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=args.max_num_seqs,
        memory=args.memory,
        prefix_cache=False,
        load_format=LOAD_FORMAT,
        extra=(*(_profiler(args.profile) if args.profile else ()), *args.serve),
    )
    paths = [str(path) for path in (*PLUGINS, ROOT)]
    if os.environ.get("PYTHONPATH"):
        paths.insert(0, os.environ["PYTHONPATH"])
    environment = {
        **variables(args.path, args.kernels, args.lowering),
        **startup.make(args.caches),
        **startup.LOG_VARIABLES,
        COMPILE_LOG: str(compile_log),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [
        "env",
        *(f"{name}={value}" for name, value in environment.items()),
        *serve.command(args.python),
    ]
    read_from = log.stat().st_size if log.exists() else 0
    async with client.http(serve.url) as http:
        spawned = time.time()
        try:
            async with launched(command, http, log, budget.left, print) as start:
                assert start is not None
                ready = spawned + start["ready_s"]
                with log.open("rb") as file:
                    file.seek(read_from)
                    said = file.read().decode("utf-8", "replace").replace("\r", "\n")
                parts = startup.stages(said, spawned, ready, startup.compilations(compile_log))
                rows.add(
                    "start",
                    caches="empty" if cold else "used before",
                    ready_s=start["ready_s"],
                    stages=startup.record(parts),
                    **startup.details(said),
                    compiled=sum(part.compiled for part in parts),
                    compiling_s=sum(part.compiling_s for part in parts),
                    caches_hold=startup.contents(args.caches),
                )
                bench = Bench(http, MODEL_NAME, vocabulary, rows, budget, compile_log, args.profile)
                if args.start_only:
                    await bench.first_requests()
                else:
                    await bench.all(
                        Plan(
                            ttft=args.ttft,
                            concurrency=args.concurrency,
                            repeats=args.repeats,
                            random=args.random,
                            requests=args.requests,
                            # More at once would wait for each other.
                            profile=tuple(one for one in Plan.profile if one <= args.max_num_seqs),
                            profile_prompts=args.profile_prompts,
                        )
                    )
        except OutOfTime as error:
            rows.add("stopped", why=f"the budget of {args.budget:g} s is spent", before=str(error))
            return 3
        except (Failed, StackError) as error:
            rows.add("failed", why=str(error))
            return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """0: all measured; 1: a start or a request failed; 2: wrong usage; 3: the budget was spent."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = checked(words)
    if args.report:
        try:
            print(tables.reports(read(args.report), args.commit))
        except StackError as error:
            hint = f"\n  -> {error.hint}" if error.hint else ""
            print(f"error: {error}{hint}", file=sys.stderr)
            return 1
        return 0
    known = about(words, args.commit) | {
        "variant": variant(args),
        "layers": args.layers,
        "tp": args.tp,
        "mtp": args.mtp,
    }
    rows = Rows(known, args.out)
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(measure(args, rows, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
