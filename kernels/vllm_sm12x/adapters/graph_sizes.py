"""Sizes of batches for which CUDA graphs are captured, besides those of vLLM's own list.

That list is 1, 2, 4 and multiples of 8, with drafting each rounded up to whole requests. A batch is
padded to the next size, and full decode graphs are captured up to the size in which all requests
decode. Where that size is not on the list, the next one is beyond it: with four requests and two
drafts each the sizes are 3, 6, 9 and 18 tokens, and a full house of 12 has no full graph. It runs
on a piecewise one, with the attention of every layer launched from Python: with 43 layers on two
H200 a step of four requests took 124 ms, one of two 16 (reports/engine).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_sm12x.adapters.mtp import is_portable_deepseek_v4

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def sizes_of_a_full_house(vllm_config: VllmConfig, largest: int) -> list[int]:
    """The size in which all requests decode at once, in tokens, where a graph can have it.

    Empty where no operation is portable, and for other models: vLLM's list stays as it is.

    Args:
        vllm_config: The engine's configuration.
        largest: Tokens of the largest graph that may be captured.
    """
    if not is_portable_deepseek_v4(vllm_config):
        return []
    requests = vllm_config.scheduler_config.max_num_seqs
    size = requests * (1 + vllm_config.num_speculative_tokens)
    return [size] if size <= largest else []
