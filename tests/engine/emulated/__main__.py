"""``python -m tests.engine.emulated score FOLDER …`` and ``… answer RUN …``."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from drafting_judge import BASE
from drafting_runs import Run, answers_of, save
from tests.checkpoint.sizes import config_of
from tests.engine.emulated.engine import SCORING, emulated_engine, prepare, print_launches
from tests.oracle.sequences import FED_TOKENS, draw_sequences

# Below the longest prompts, so that they are read in chunks.
MAX_BATCHED_TOKENS = 128
MAX_NUM_SEQS = 5
# As in `drafting_runs`, for a GPU that is a thousand times slower.
REQUESTS = ((1, 8), (125, 6), (520, 6))
GROWING = ((5, 18), (8, 18), (11, 18))
FEW_BATCHED_TOKENS = 48
MAX_MODEL_LEN, SHORT_MODEL_LEN = 600, 34
# Our kernels take no fewer heads than `small` has.
SIZES = {"none": "tiny", "all": "small"}


def main(argv: list[str] | None = None) -> int:
    """Score a checkpoint, or answer requests with and without drafting."""
    parser = argparse.ArgumentParser(prog="python -m tests.engine.emulated", description=__doc__)
    commands = parser.add_subparsers(required=True)
    score = commands.add_parser("score", help="log-probabilities, as score_checkpoint.py has them")
    score.add_argument("folder", type=Path, help="a checkpoint")
    score.add_argument("--out", type=Path, required=True, help="the run, as .npz")
    score.add_argument("--prompts", type=_numbers, default=(1, 3, 126, 270), metavar="N,N,…")
    score.add_argument(
        "--fed",
        type=int,
        default=FED_TOKENS,
        help="tokens fed one at a time after each prompt (default: %(default)s)",
    )
    score.add_argument("--tp", type=int, default=1, help="ranks, a process each (default: 1)")
    score.set_defaults(run=_score)
    answer = commands.add_parser("answer", help="greedy answers, as compare_drafting.py has them")
    answer.add_argument(
        "names", nargs="+", metavar="RUN", help="such as mtp2-cache: see drafting_runs.py"
    )
    answer.add_argument("--out", type=Path, required=True, help="folder for RUN.json of each")
    answer.add_argument("--jobs", type=int, default=1, help="runs beside each other (default: 1)")
    answer.set_defaults(run=_answer)
    for command in (score, answer):
        command.add_argument("--kernels", choices=("all", "none"), default="none")
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _score(args: argparse.Namespace) -> None:
    config = json.loads((args.folder / "config.json").read_text(encoding="utf-8"))
    from score_checkpoint import score
    from tests.checkpoint.digest import digest
    from tests.oracle.scores import MOST_KEPT, Scores

    vocab_size = config["vocab_size"]
    kept = min(vocab_size, MOST_KEPT)
    sequences = draw_sequences(vocab_size, args.prompts, args.fed)
    began = time.perf_counter()
    with emulated_engine(
        args.kernels,
        model=str(args.folder),
        tensor_parallel_size=args.tp,
        max_model_len=max(len(sequence.tokens) for sequence in sequences) + 2,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        max_num_seqs=MAX_NUM_SEQS,
        max_logprobs=MOST_KEPT,
        **SCORING,
    ) as (llm, driver):
        tokens, logprobs = score(llm, sequences, kept)
    Scores(
        checkpoint=digest(args.folder),
        sequences=sequences,
        tokens=tokens,
        logprobs=logprobs,
        vocab_size=vocab_size,
        facts=_facts(args.kernels) | {"seconds": round(time.perf_counter() - began, 1)},
    ).save(args.out)
    print_launches(driver)


def _answer(args: argparse.Namespace) -> None:
    for name in args.names:
        if "piecewise" in Run.of(name).flags:
            raise ValueError(f"run: {name!r}, allowed here: no piecewise graphs, nothing compiles")
    args.out.mkdir(parents=True, exist_ok=True)
    prepare()
    # Each in a process of its own, which has imported vLLM already.
    fork = multiprocessing.get_context("fork")
    with fork.Pool(args.jobs, maxtasksperchild=1) as pool:
        # Preemption needs to know how many blocks the others used.
        for scarce in (False, True):
            names = [name for name in args.names if scarce == ("preempted" in Run.of(name).flags)]
            jobs = [(name, args.kernels, args.out) for name in names]
            for name in pool.starmap(_answer_one, jobs, chunksize=1):
                print(f"{name}.json", flush=True)


def _answer_one(name: str, kernels: str, out: Path) -> str:
    what = Run.of(name)
    os.environ.update(what.environment())
    blocks = None
    if "preempted" in what.flags:
        blocks = json.loads((out / f"{BASE}.json").read_text(encoding="utf-8"))["blocks_used"]
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(SIZES[kernels])
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        options = what.options(Path(folder), blocks) | {"gpu_memory_utilization": 0.5}
        # Nothing compiles the model here. Graphs of whole steps need no more than they record.
        options["compilation_config"] |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        options |= {
            "max_model_len": SHORT_MODEL_LEN if blocks is not None else MAX_MODEL_LEN,
            "max_num_batched_tokens": (
                FEW_BATCHED_TOKENS if "chunks" in what.flags else MAX_BATCHED_TOKENS
            ),
        }
        with emulated_engine(kernels, **options) as (llm, _):
            result = answers_of(name, llm, REQUESTS, GROWING)
    save(result | _facts(kernels), out / f"{name}.json")
    return name


def _facts(kernels: str) -> dict[str, Any]:
    import torch
    import triton
    import vllm

    from environment import commit, now

    return {
        "implementation": "vllm",
        "gpu": "emulated, sm_120a",
        "kernels": kernels,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "date": now(),
    }


if __name__ == "__main__":
    sys.exit(main())
