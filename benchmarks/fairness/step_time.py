"""How long a step of the engine takes: a stated, simple model, fitted to published measurements.

The measurements are those of vllm-project/vllm#41834 (2 x RTX PRO 6000, TP=2, MTP=2, 4,096 batched
tokens, no prefix cache). K is 1,000 tokens.

* Reading a prompt of ``n`` K from position 0 takes ``0.1713 n + 0.000633 n^2`` s: through the times
  to the first token at 16.384 K (2.976 s) and 124.08 K (30.99 s). At 1.024, 4.096, 58.98 and
  65.536 K it gives 0.176, 0.712, 12.30 and 13.94 s; measured were 0.165, 0.684, 12.16 and 14.34 s.
* A step that decodes for ``r`` requests takes ``10.9 + 3.3 r`` ms: mt-bench's time per token times
  its acceptance length, 14.1 ms at concurrency 1, 17.9 at 2 and 23.9 at 4.
* The context adds 0.087 ms a request and K: 25.0 ms a step at 124.08 K, which is 105.8 tokens a
  second with 2.65 tokens a step (the acceptance length of random 8K/1K at concurrency 1).
* A step that does both takes what its prompt tokens and its decoding requests add, and at least the
  10.9 ms in which the weights are read once.
"""

from __future__ import annotations

from collections.abc import Iterable

# Seconds a thousand tokens of a prompt, and a thousand tokens squared.
PROMPT, PROMPT_SQUARED = 0.17128, 6.325e-4
# Seconds a step, a decoding request, and a thousand tokens of such a request's context.
STEP, REQUEST, CONTEXT = 10.9e-3, 3.3e-3, 0.087e-3
# Tokens that a decode step yields with two drafts, on average; and how likely a draft is accepted
# when those before it were: 1 + p + p^2 = 2.65.
TOKENS_A_STEP, ACCEPTANCE = 2.65, 0.8784


def prompt_seconds(start: int, count: int) -> float:
    """Seconds to read ``count`` tokens of a prompt from position ``start`` on."""
    first, last = start / 1000, (start + count) / 1000
    return PROMPT * (last - first) + PROMPT_SQUARED * (last**2 - first**2)


def step_seconds(prompts: Iterable[tuple[int, int]], contexts: Iterable[int]) -> float:
    """Seconds of one step.

    Args:
        prompts: ``(start, count)`` of each piece of a prompt in the step, in tokens.
        contexts: Tokens before the step of each request that decodes in it.
    """
    reading = sum(prompt_seconds(start, count) for start, count in prompts)
    decoding = sum(REQUEST + CONTEXT * context / 1000 for context in contexts)
    return max(STEP, reading) + decoding
