"""Engines that answer the same requests in other ways: drafting or not, graphs, cache, preemption.

A run's name says how: ``mtp2-piecewise-cache`` drafts two tokens, decodes on piecewise CUDA graphs
and keeps a prefix cache. ``mtp0``, without more, is what all others are held against.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flash_config import LOAD_FORMAT, write_config

# Of each request: tokens of the prompt, and of the answer. Prompts end around the edges of the
# window, of a C128A entry and of a block, so that answers cross them; answers end one after the
# other, so that a batch shrinks through sizes that graphs are padded for, and requests that wait
# join it.
REQUESTS = ((1, 40), (60, 24), (125, 40), (250, 33), (253, 17), (507, 28), (762, 40), (3000, 12))
# Short prompts and long answers, all at once: what they need of the KV cache grows while they
# decode. A prompt needs more blocks than the same tokens do once they are decoded, so that among
# long prompts it is the next one that waits, and none that decodes is preempted.
GROWING = ((5, 150), (8, 150), (11, 150), (14, 150), (17, 150))
# Fewer than the requests: the others join as some end. Batches of 3 and 5 run in graphs for 4 and
# 6; there are no full graphs for more requests than this.
MAX_NUM_SEQS = 6
GRAPH_REQUESTS = (1, 2, 4, 6)
MAX_MODEL_LEN = 3072
# With preemption: a cache must hold one request of this length, and GROWING fits.
SHORT_MODEL_LEN = 256
# Of the blocks that GROWING used at most, what a cache with preemption has.
SCARCE = 0.8
# Less than the longest prompt, so that it is read in chunks; with `chunks` most prompts are.
MAX_BATCHED_TOKENS = 2048
FEW_BATCHED_TOKENS = 192
# Tokens that an answer can have. With so few, a draft of random weights is right now and then.
LIVELY_TOKENS = 8

FLAGS = {
    "piecewise": "decode on piecewise CUDA graphs, no full ones",
    "drafts": "drafting passes in CUDA graphs of their own",
    "eager": "no CUDA graphs, no torch.compile",
    "async": "steps scheduled before the last one's end, as vLLM serves; when a request joins then "
    "depends on the host's pace, and with it how the numbers round",
    "unordered": "the indexer's entries in the order in which upstream's top-k writes them, as in "
    "serving; it differs from pass to pass, and with it how the numbers round",
    "cache": "a prefix cache; the requests are sent a second time",
    "chunks": f"at most {FEW_BATCHED_TOKENS} tokens a step",
    "preempted": "fewer KV blocks than growing answers of mtp0 used, so that some are preempted",
}


@dataclass(frozen=True)
class Run:
    """What a run's name says."""

    mtp: int
    flags: frozenset[str]

    @classmethod
    def of(cls, name: str) -> Run:
        """
        Raises:
            ValueError: It is no name of a run; the message says what is allowed.
        """
        match = re.fullmatch(r"mtp([0-9])((?:-[a-z]+)*)", name)
        flags = match[2].split("-")[1:] if match else []
        unknown = [flag for flag in flags if flag not in FLAGS]
        if match is None or unknown or len(set(flags)) < len(flags):
            raise ValueError(
                f"run: {name!r}, allowed: mtp0 to mtp9, followed by any of -"
                + ", -".join(FLAGS)
                + ", each once"
            )
        if len({"piecewise", "drafts", "eager"} & set(flags)) > 1:
            raise ValueError(f"run: {name!r}, allowed: one of piecewise, drafts and eager")
        return cls(int(match[1]), frozenset(flags))

    def environment(self) -> dict[str, str]:
        """Variables that must be set before vLLM is imported."""
        return {
            "SM12X_MTP_FULL_GRAPHS": "never" if "piecewise" in self.flags else "always",
            "SM12X_DRAFT_GRAPHS": "always" if "drafts" in self.flags else "never",
        }

    def options(self, folder: Path, blocks: int | None = None) -> dict[str, Any]:
        """Arguments of ``vllm.LLM``, but for the memory that it takes.

        Args:
            blocks: KV blocks that :data:`GROWING` used at most in ``mtp0``; for preemption.

        Raises:
            ValueError: The run has preemption and ``blocks`` is not given.
        """
        compilation: dict[str, Any] = {
            "cudagraph_capture_sizes": [(1 + self.mtp) * n for n in GRAPH_REQUESTS]
        }
        if "piecewise" in self.flags and not self.mtp:
            compilation["cudagraph_mode"] = "PIECEWISE"
        options: dict[str, Any] = {
            "model": str(folder),
            "skip_tokenizer_init": True,
            "load_format": LOAD_FORMAT,
            "model_loader_extra_config": {"lively_tokens": LIVELY_TOKENS},
            "kv_cache_dtype": "fp8",
            "block_size": 256,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_batched_tokens": (
                FEW_BATCHED_TOKENS if "chunks" in self.flags else MAX_BATCHED_TOKENS
            ),
            "max_num_seqs": MAX_NUM_SEQS,
            "enable_prefix_caching": "cache" in self.flags,
            "enforce_eager": "eager" in self.flags,
            "async_scheduling": "async" in self.flags,
            "compilation_config": compilation,
            "disable_log_stats": False,
            "seed": 0,
        }
        if self.mtp:
            options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": self.mtp}
        if "preempted" in self.flags:
            if blocks is None:
                raise ValueError("blocks: None, allowed with preemption: what mtp0 used at most")
            options["num_gpu_blocks_override"] = math.ceil(SCARCE * blocks)
            options["max_model_len"] = SHORT_MODEL_LEN
        return options


@dataclass
class Watched:
    """What happened in an engine after its start; ``blocks_used`` at most, at once."""

    blocks_used: int = 0
    compiled: Counter = field(default_factory=Counter)


def watch(llm: Any) -> Watched:
    """Watch an engine of this process from now on: its KV blocks, and every kernel it compiles."""
    from triton import knobs

    watched = Watched()
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    schedule = scheduler.schedule

    def counted(*args, **kwargs):
        output = schedule(*args, **kwargs)
        # Less the null block, which is never free.
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        watched.blocks_used = max(watched.blocks_used, used)
        return output

    scheduler.schedule = counted
    before = knobs.runtime.jit_post_compile_hook

    def compiled(**kwargs):
        watched.compiled[getattr(kwargs.get("fn"), "name", "unknown")] += 1
        return before(**kwargs) if before is not None else None

    knobs.runtime.jit_post_compile_hook = compiled
    return watched


def ask(llm: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Greedy answers, as JSON can hold them; an answer's tokens, steps and cached tokens."""
    from vllm import SamplingParams

    from answers import Answer

    wanted = [
        SamplingParams(
            temperature=0.0,
            max_tokens=request["answer"],
            ignore_eos=True,
            logprobs=LIVELY_TOKENS,
            detokenize=False,
        )
        for request in requests
    ]
    prompts = [{"prompt_token_ids": request["prompt"]} for request in requests]
    found = []
    for output in llm.generate(prompts, wanted, use_tqdm=False):
        one = Answer.of(output)
        steps = [list(step.items()) for step in one.steps]
        found.append({"tokens": one.tokens, "steps": steps, "cached": output.num_cached_tokens})
    return found


def draw_requests(lengths: Sequence[tuple[int, int]], vocab_size: int) -> list[dict[str, Any]]:
    """Random prompts, the same each time; lengths of prompts and answers are given."""
    draw = random.Random(20261124)
    return [
        {"prompt": [draw.randrange(2, vocab_size) for _ in range(length)], "answer": tokens}
        for length, tokens in lengths
    ]


def metrics(llm: Any) -> dict[str, int]:
    """The engine's counters of drafts, accepted tokens and preemptions."""
    names = {
        "vllm:spec_decode_num_draft_tokens": "drafted",
        "vllm:spec_decode_num_accepted_tokens": "accepted",
        "vllm:num_preemptions": "preemptions",
    }
    found = dict.fromkeys(names.values(), 0)
    for metric in llm.get_metrics():
        if metric.name in names:
            found[names[metric.name]] += metric.value
    return found


def passes_replayed(llm: Any) -> int:
    """Drafting passes that an engine of this process replayed as graphs of their own."""
    core = llm.llm_engine.engine_core.engine_core
    drafter = getattr(core.model_executor.driver_worker.worker.model_runner, "drafter", None)
    return 0 if drafter is None else getattr(drafter.model, "replayed", 0)


def run(name: str, folder: Path, memory: dict[str, Any], blocks: int | None) -> dict[str, Any]:
    """Start the engine of a run, answer the requests, and say what happened.

    Args:
        memory: Arguments of ``vllm.LLM`` for the memory that it takes.
        blocks: As :meth:`Run.options`.
    """
    what = Run.of(name)
    write_config(folder)
    from vllm import LLM

    import made_weights  # noqa: F401  registers the loader
    import selection_order

    if "unordered" not in what.flags:
        selection_order.install()
    return answers_of(name, LLM(**what.options(folder, blocks), **memory))


def answers_of(
    name: str,
    llm: Any,
    requests: Sequence[tuple[int, int]] = REQUESTS,
    growing: Sequence[tuple[int, int]] = GROWING,
) -> dict[str, Any]:
    """What an engine answers, and what happened meanwhile.

    ``mtp0`` also answers in other batches: how far that moves an answer is the noise.

    Args:
        name: The run's.
        requests: Lengths of prompts and answers.
        growing: Likewise, of what is asked at once.
    """
    what = Run.of(name)
    vocab_size = llm.llm_engine.model_config.get_vocab_size()
    mixed, growing = (draw_requests(lengths, vocab_size) for lengths in (requests, growing))
    watched = watch(llm)
    answers = {"growing": ask(llm, growing)}
    blocks_used = watched.blocks_used
    if name == "mtp0":
        answers["growing alone"] = [ask(llm, [request])[0] for request in growing]
        answers["reversed"] = ask(llm, mixed[::-1])[::-1]
        answers["alone"] = [ask(llm, [request])[0] for request in mixed]
    if "preempted" not in what.flags:
        answers["mixed"] = ask(llm, mixed)
        if "cache" in what.flags:
            answers["again"] = ask(llm, mixed)
    return {
        "run": name,
        "environment": {key: os.environ[key] for key in what.environment()},
        "blocks_used": blocks_used,
        "compiled": dict(watched.compiled),
        **metrics(llm),
        "replayed": passes_replayed(llm),
        "answers": answers,
    }


def save(result: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.replace(path)
