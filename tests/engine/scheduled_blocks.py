"""What vLLM's own scheduler needs of the KV cache for the growing answers; prints JSON.

It runs on DeepSeek V4's cache groups, without a GPU, and wants a platform's process
(`tests/upstream/platform`).
"""

from __future__ import annotations

import json
import math

from benchmarks.fairness import simulate
from drafting_runs import GROWING, MAX_BATCHED_TOKENS, MAX_NUM_SEQS, SCARCE, SHORT_MODEL_LEN


def scheduled(jobs: list[tuple[int, int]], *blocks: int) -> dict[str, int]:
    """Blocks used at most and preemptions, with a cache of so many blocks."""
    settings = simulate.Settings(
        max_num_batched_tokens=MAX_BATCHED_TOKENS, max_num_seqs=MAX_NUM_SEQS
    )
    scheduler = simulate.make_scheduler(settings, *blocks)
    pool = scheduler.kv_cache_manager.block_pool
    seen = {"used": 0, "preemptions": 0}
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def counted():
        output = schedule()
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        seen["used"] = max(seen["used"], used)
        return output

    def preempted(*args, **kwargs):
        seen["preemptions"] += 1
        return preempt(*args, **kwargs)

    scheduler.schedule, scheduler._preempt_request = counted, preempted
    simulate.simulate(settings, [simulate.Job(0.0, *job) for job in jobs], scheduler=scheduler)
    return seen


if __name__ == "__main__":
    plenty = scheduled(GROWING)
    scarce = math.ceil(SCARCE * plenty["used"])
    longest = [(SHORT_MODEL_LEN - 4, 4)]
    print(
        json.dumps(
            {
                "plenty": plenty,
                "scarce": scheduled(GROWING, scarce),
                "longest": scheduled(longest, scarce),
            }
        )
    )
