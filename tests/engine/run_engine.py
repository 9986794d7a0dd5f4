"""Start vLLM on a Flash-shaped model with the portable path forced, and answer requests.

    python tests/engine/run_engine.py --out portable.json

The model is a few layers of DeepSeek V4 Flash's full width, of every kind, with made weights in the
checkpoint's formats; nothing is downloaded. Tripwires turn every call into FlashMLA, DeepGEMM,
TileLang or CuTeDSL into an error. Needs a CUDA GPU with 40 GB, and the wheel installed.

What is checked: every request is answered in full, with finite log-probabilities and text that
does not repeat one token; prefilling the tokens of an answer goes on as decoding did; a request
gives the same alone and in a batch. Where two ways part, both tokens must have been as likely as
the noise of bf16 allows. ``--path native`` runs upstream's kernels instead, without tripwires, and
``--compare OTHER.json`` states how far two such runs are apart.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from answers import ALTERNATIVES, Answer, difference
from drawing import LOGIT_STD
from environment import (
    add_path_options,
    command,
    commit,
    machine,
    memory_options,
    now,
    prepare,
    settings,
)
from flash_config import write_config

PROMPT_LENGTHS = (1, 5, 127, 130, 700, 3000)
OUTPUT_TOKENS = 24
# Where the answer is cut for the second look at it: prefill what was decoded up to here.
CUT = 12
MAX_MODEL_LEN = 8192
# Below the longest prompt, so that it is read in chunks.
MAX_BATCHED_TOKENS = 2048
# Two ways to the same position (another batch, prefill for decode) round FP8 activations and sum
# bf16 in another order, and with weights drawn at random nothing damps that from layer to layer.
# Upstream's kernels on an H200 part in every answer and differ by up to 0.75 with themselves (see
# reports/engine); a quarter of the logits' standard deviation is above that and far below what a
# wrong kernel gives.
LOGPROB_TOLERANCE = LOGIT_STD / 4


def prompts(vocab_size: int) -> list[list[int]]:
    draw = random.Random(20261123)
    return [[draw.randrange(2, vocab_size) for _ in range(length)] for length in PROMPT_LENGTHS]


def start(args: argparse.Namespace, folder: Path) -> Any:
    write_config(folder)
    from vllm import LLM

    import made_weights

    step = 1 + args.mtp
    options: dict[str, Any] = {}
    if args.mtp:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": args.mtp}
    return LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format=made_weights.LOAD_FORMAT,
        kv_cache_dtype="fp8",
        block_size=256,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        max_num_seqs=8,
        **memory_options(args),
        enable_prefix_caching=False,
        enforce_eager=args.eager,
        compilation_config={"cudagraph_capture_sizes": [step * n for n in (1, 2, 4, 8)]},
        seed=0,
        **options,
    )


def generate(
    llm: Any, batch: list[list[int]], tokens: int, prompt_logprobs: int | None = None
) -> list[Any]:
    from vllm import SamplingParams

    wanted = SamplingParams(
        temperature=0.0,
        max_tokens=tokens,
        ignore_eos=True,
        logprobs=ALTERNATIVES,
        prompt_logprobs=prompt_logprobs,
        detokenize=False,
    )
    return llm.generate([{"prompt_token_ids": p} for p in batch], wanted, use_tqdm=False)


def answer(llm: Any, batch: list[list[int]], tokens: int) -> list[Answer]:
    return [Answer.of(output) for output in generate(llm, batch, tokens)]


def teacher_forced(output: Any, prompt: list[int]) -> dict[str, list[float]]:
    """Log-probability of each prompt token but the first, and the most likely token there."""
    steps = output.prompt_logprobs[1:]
    return {
        "logprob": [step[token].logprob for token, step in zip(prompt[1:], steps, strict=True)],
        "top": [min(step, key=lambda token, step=step: step[token].rank) for step in steps],
    }


class Checks:
    """Collects what held and what did not, and prints a line for each."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, holds: bool, seen: str) -> None:
        self.rows.append({"check": what, "holds": bool(holds), "seen": seen})
        print(f"{'ok  ' if holds else 'FAIL'} {what}: {seen}", flush=True)


def check_same(
    what: str, pairs: Iterable[tuple[Answer, Answer]], checks: Checks
) -> dict[str, float]:
    """Hold two ways to the same answers against each other."""
    found = [difference(first, second) for first, second in pairs]
    forks = [one.fork for one in found if one.fork is not None]
    seen = {
        "answers": len(found),
        "largest_gap": max(one.gap for one in found),
        "forks": len(forks),
        "largest_fork": max(forks, default=0.0),
    }
    checks.add(
        what,
        max(seen["largest_gap"], seen["largest_fork"]) <= LOGPROB_TOLERANCE,
        f"log-probabilities within {seen['largest_gap']:.4f}, {len(forks)} of {len(found)} answers "
        f"part, at tokens within {seen['largest_fork']:.4f} of each other",
    )
    return seen


def check_answers(llm: Any, batch: list[list[int]], checks: Checks) -> dict[str, Any]:
    began = time.perf_counter()
    answers = answer(llm, batch, OUTPUT_TOKENS)
    first_s = time.perf_counter() - began
    for prompt, one in zip(batch, answers, strict=True):
        name = f"prompt of {len(prompt)}"
        count, distinct = len(one.tokens), len(set(one.tokens))
        checks.add(f"{name}: answered", count == OUTPUT_TOKENS, f"{count} tokens")
        finite = all(map(math.isfinite, one.logprobs))
        checks.add(f"{name}: finite", finite, f"mean log-probability {mean(one.logprobs):.3f}")
        checks.add(f"{name}: varied", distinct > OUTPUT_TOKENS // 2, f"{distinct} distinct tokens")

    longer = [p + one.tokens[:CUT] for p, one in zip(batch, answers, strict=True)]
    again = answer(llm, longer, 1)
    tails = [one.tail(CUT) for one in answers]
    prefill = check_same("prefill goes on as decode did", zip(tails, again, strict=True), checks)
    alone = [answer(llm, [p], OUTPUT_TOKENS)[0] for p in batch]
    single = check_same("alone as in a batch", zip(answers, alone, strict=True), checks)
    began = time.perf_counter()
    answer(llm, batch, OUTPUT_TOKENS)
    second_s = time.perf_counter() - began
    return {
        "first_batch_s": round(first_s, 3),
        "same_batch_again_s": round(second_s, 3),
        "prefill_against_decode": prefill,
        "alone_against_batch": single,
        "answers": [{"tokens": one.tokens, "logprobs": one.logprobs} for one in answers],
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def compare(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How far two runs are apart at the same positions of the same prompt."""
    a, b = mine["teacher_forced"], other["teacher_forced"]
    gaps = [abs(x - y) for x, y in zip(a["logprob"], b["logprob"], strict=True)]
    same = [x == y for x, y in zip(a["top"], b["top"], strict=True)]
    return {
        "positions": len(gaps),
        "mean_logprob_gap": round(mean(gaps), 5),
        "largest_logprob_gap": round(max(gaps), 5),
        "top_1_agreement": round(mean(same), 5),
    }


def save(report: dict[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_path_options(parser)
    parser.add_argument("--mtp", type=int, default=0, help="speculative tokens (default: 0)")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs, no torch.compile")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--compare", type=Path, help="a report of another run to compare with")
    args = parser.parse_args()
    if args.mtp < 0:
        parser.error(f"--mtp {args.mtp}: allowed: 0 and more")
    if args.compare and args.mtp:
        parser.error("--compare needs --mtp 0: prompts are not scored while drafting")
    if args.compare and not args.compare.is_file():
        parser.error(f"--compare {args.compare}: no such file")
    return args


def main() -> int:
    args = arguments()
    guarded = prepare(args)
    if guarded:
        import tripwire

    checks = Checks()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        llm = start(args, Path(folder))
        start_s = time.perf_counter() - began
        print(f"engine ready after {start_s:.1f} s", flush=True)
        batch = prompts(llm.llm_engine.model_config.get_vocab_size())
        report: dict[str, Any] = {
            "date": now(),
            "commit": args.commit or commit(),
            "command": command("run_engine.py", args.out, args.compare),
            "machine": machine(),
            **settings(),
            "mtp": args.mtp,
            "eager": args.eager,
            "start_s": round(start_s, 1),
        }
        if not args.mtp:
            forced = batch[PROMPT_LENGTHS.index(700)]
            (output,) = generate(llm, [forced], 1, prompt_logprobs=1)
            report["teacher_forced"] = teacher_forced(output, forced)
            if args.compare:
                report["compared"] = compare(report, json.loads(args.compare.read_text()))
                print(f"compared with {args.compare.name}: {report['compared']}", flush=True)
            save(report, args.out)
        report.update(check_answers(llm, batch, checks))
    if guarded:
        checks.add(
            "no call into FlashMLA, DeepGEMM, TileLang or CuTeDSL",
            not tripwire.calls,
            f"{len(tripwire.calls)} calls {sorted(set(tripwire.calls))[:5]}",
        )
    report["checks"] = checks.rows
    save(report, args.out)
    failed = sum(not row["holds"] for row in checks.rows)
    host = report["machine"]
    print(
        f"{host['gpu']}, vLLM {host['vllm']}, start {report['start_s']} s, "
        f"first batch {report['first_batch_s']} s, again {report['same_batch_again_s']} s"
    )
    print(f"{len(checks.rows) - failed} checks hold, {failed} do not")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
