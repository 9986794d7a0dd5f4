"""``python -m benchmarks.fairness.simulate``: long prompts beside running answers, without a GPU.

vLLM's own scheduler decides every step, on DeepSeek V4 Flash's own KV-cache groups; a stated model
(``step_time.py``) says how long the step takes; drafts are accepted at random, with a fixed seed.
vLLM needs a platform: put ``tests/upstream/platform`` on ``PYTHONPATH`` where there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.fairness.step_time import ACCEPTANCE, step_seconds
from tests.dispatch import flash_cache
from tests.engine.flash_config import flash_config

DRAFTED = 2
MAX_MODEL_LEN = 131072
LONG, SHORT = 124_080, 1_000


@dataclass(frozen=True)
class Settings:
    """What an operator can choose, by vLLM's names; and the policy that is tried, if any.

    ``prefill_beside_decode``: prompt tokens of a step that also decodes, at most; ``None``: no
    limit, as in vLLM.
    """

    max_num_batched_tokens: int = 4096
    long_prefill_token_threshold: int = 0
    max_num_seqs: int = 4
    prefill_beside_decode: int | None = None


@dataclass(frozen=True)
class Job:
    """A request: when it comes (seconds), its prompt and its answer (tokens)."""

    arrival: float
    prompt: int
    answer: int


@dataclass
class Timeline:
    """What a client saw of a job: at each time, in seconds, how many tokens had come."""

    job: Job
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @property
    def first_token(self) -> float:
        """Seconds from the arrival to the first token."""
        return self.times[0] - self.job.arrival

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        return (self.counts[-1] - self.counts[0]) / (self.times[-1] - self.times[0])

    @property
    def longest_stall(self) -> float:
        """Longest time between two arrivals of tokens, in seconds."""
        return max(b - a for a, b in itertools.pairwise(self.times))


def engine_config(settings: Settings) -> object:
    """vLLM's configuration of a Flash-shaped model with MTP=2 and these settings."""
    from vllm.config import (
        CacheConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        SpeculativeConfig,
        VllmConfig,
    )

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(flash_config()))
        model = ModelConfig(
            model=folder, skip_tokenizer_init=True, max_model_len=MAX_MODEL_LEN, dtype="bfloat16"
        )
        parallel = ParallelConfig()
        drafting = SpeculativeConfig(
            method="mtp",
            num_speculative_tokens=DRAFTED,
            target_model_config=model,
            target_parallel_config=parallel,
        )
        config = VllmConfig(
            model_config=model,
            parallel_config=parallel,
            speculative_config=drafting,
            cache_config=CacheConfig(block_size=256, enable_prefix_caching=False),
            scheduler_config=SchedulerConfig(
                max_model_len=MAX_MODEL_LEN,
                is_encoder_decoder=False,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                long_prefill_token_threshold=settings.long_prefill_token_threshold,
                async_scheduling=False,
            ),
        )
    # Where the configuration is made on the CPU platform, that forbids chunks for this model.
    config.scheduler_config.enable_chunked_prefill = True
    config.scheduler_config.max_num_batched_tokens = settings.max_num_batched_tokens
    config.scheduler_config.max_num_scheduled_tokens = None
    return config


def make_scheduler(settings: Settings, blocks: int = 200_000) -> object:
    """vLLM's scheduler; by default, prompts and answers fit into its cache."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.structured_output import StructuredOutputManager

    config = engine_config(settings)
    cache = flash_cache.scheduler_config(blocks=blocks)
    config.cache_config.num_gpu_blocks = cache.num_blocks
    return Scheduler(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=256,
        hash_block_size=256,
    )


def simulate(
    settings: Settings, jobs: list[Job], seed: int = 0, scheduler: object | None = None
) -> list[Timeline]:
    """Run jobs to their ends, and return what their clients saw, in the order of ``jobs``.

    Args:
        scheduler: What :func:`make_scheduler` gave; None: a new one.
    """
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

    scheduler = scheduler or make_scheduler(settings)
    budget = scheduler.max_num_scheduled_tokens
    drawn = random.Random(seed)
    timelines = [Timeline(job) for job in jobs]
    coming = sorted(range(len(jobs)), key=lambda number: jobs[number].arrival)
    clock = 0.0
    while coming or scheduler.has_requests():
        if not scheduler.has_requests():
            clock = max(clock, jobs[coming[0]].arrival)
        while coming and jobs[coming[0]].arrival <= clock:
            number = coming.pop(0)
            scheduler.add_request(_request(number, jobs[number]))
        if settings.prefill_beside_decode is not None:
            decoding = sum(_decodes(request) for request in scheduler.running)
            beside = decoding * (1 + DRAFTED) + settings.prefill_beside_decode
            scheduler.max_num_scheduled_tokens = min(budget, beside) if decoding else budget
        before = {name: request.num_computed_tokens for name, request in scheduler.requests.items()}
        output = scheduler.schedule()
        if not output.num_scheduled_tokens and scheduler.has_unfinished_requests():
            raise RuntimeError(f"{settings}: nothing is scheduled, and requests are left")
        prompts, contexts, sampled = [], [], []
        for name, count in output.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            start = before[name]
            if start < request.num_prompt_tokens:
                prompts.append((start, count))
                sampled.append([2] if start + count == request.num_prompt_tokens else [])
            else:
                contexts.append(start)
                sampled.append([2] * _kept(drawn, count - 1))
        clock += step_seconds(prompts, contexts)
        names = list(output.num_scheduled_tokens)
        done = scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: number for number, name in enumerate(names)},
                sampled_token_ids=sampled,
            ),
        )
        for answer in done[0].outputs if 0 in done else ():
            if answer.new_token_ids:
                timeline = timelines[int(answer.request_id)]
                total = timeline.counts[-1] if timeline.counts else 0
                timeline.times.append(clock)
                timeline.counts.append(total + len(answer.new_token_ids))
        scheduler.update_draft_token_ids(DraftTokenIds(names, [[2] * DRAFTED for _ in names]))
    return timelines


def _request(number: int, job: Job) -> object:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    return Request(
        request_id=str(number),
        prompt_token_ids=[2] * job.prompt,
        sampling_params=SamplingParams(max_tokens=job.answer, ignore_eos=True),
        pooling_params=None,
    )


def _decodes(request: object) -> bool:
    return request.num_computed_tokens >= request.num_prompt_tokens


def _kept(drawn: random.Random, drafts: int) -> int:
    """Tokens that a decode step yields: drafts until the first that is rejected, and one."""
    kept = 1
    while kept <= drafts and drawn.random() < ACCEPTANCE:
        kept += 1
    return kept


CHOICES = {
    "as released": Settings(),
    "smaller steps": Settings(max_num_batched_tokens=1024),
    "one after the other": Settings(max_num_seqs=1),
    "threshold 2048": Settings(long_prefill_token_threshold=2048),
    "threshold 1024": Settings(long_prefill_token_threshold=1024),
    "threshold 512": Settings(long_prefill_token_threshold=512),
    "threshold 256": Settings(long_prefill_token_threshold=256),
    "256 beside decode": Settings(prefill_beside_decode=256),
    "128 beside decode": Settings(prefill_beside_decode=128),
    "none beside decode": Settings(prefill_beside_decode=0),
}
ANSWERS = (128, 512, 1280, 4096)


def two_at_once(settings: Settings, answer: int) -> dict[str, float]:
    """Two prompts of 124K tokens at once."""
    seen = simulate(settings, [Job(0.0, LONG, answer)] * 2)
    rates = sorted(timeline.rate for timeline in seen)
    firsts = [timeline.first_token for timeline in seen]
    return {
        "rate min": rates[0],
        "rate max": rates[1],
        "min/max": rates[0] / rates[1],
        "first token mean s": statistics.mean(firsts),
        "first token max s": max(firsts),
        "longest stall s": max(timeline.longest_stall for timeline in seen),
        "end s": max(timeline.times[-1] for timeline in seen),
    }


def prompt_beside_answer(settings: Settings) -> dict[str, float]:
    """A prompt of 124K tokens comes while a short request is being answered."""
    running, late = simulate(settings, [Job(0.0, SHORT, 8192), Job(5.0, LONG, 128)])
    read = late.first_token
    during = [
        (time, count)
        for time, count in zip(running.times, running.counts, strict=True)
        if 5.0 <= time <= 5.0 + read
    ]
    rate = (during[-1][1] - during[0][1]) / (during[-1][0] - during[0][0]) if during[1:] else 0.0
    return {
        "answer's rate meanwhile": rate,
        "answer's longest stall s": running.longest_stall,
        "prompt's first token s": read,
    }


def main() -> int:
    """Run every choice, print the tables, and write ``results.json`` where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    results = []
    for name, settings in CHOICES.items():
        row = {"choice": name, "settings": asdict(settings), "two at once": {}}
        for answer in ANSWERS:
            row["two at once"][str(answer)] = two_at_once(settings, answer)
        row["prompt beside an answer"] = prompt_beside_answer(settings)
        results.append(row)
        print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
