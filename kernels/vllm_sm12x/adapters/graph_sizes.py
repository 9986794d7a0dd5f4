"""Sizes of batches for which CUDA graphs are captured, besides those of vLLM's own list.

That list is 1, 2, 4 and multiples of 8, with drafting each rounded up to whole requests: with two
drafts 3, 6, 9, 18 and 24 tokens. A batch is padded to the next size, and full decode graphs are
captured up to the size in which all requests decode. Two things are lost by that:

* Where that size is not on the list, the next one is beyond it: of at most four requests with two
  drafts each, all four have 12 tokens and no full graph. They run on a piecewise one, with the
  attention of every layer launched from Python: with 43 layers on two H200 a step of four requests
  took 124 ms, one of two 16.
* Padding is no token of anyone's, but it is routed to experts, whose weights are read for it. Of at
  most eight requests, four run in the graph of six: 43 layers take 20 ms a step on two H200, and
  16 in a graph of their own (reports/engine).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_sm12x.adapters.mtp import is_portable_deepseek_v4

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Each number of requests up to this has a graph of its own. Every graph takes time at the start,
# and the fewer the tokens, the more of the experts that padding reads are nobody else's.
MOST_REQUESTS = 16


def decode_sizes(vllm_config: VllmConfig, largest: int) -> list[int]:
    """Sizes in tokens: of 1 to :data:`MOST_REQUESTS` requests that decode, and of all at once.

    Empty where no operation is portable, and for other models: vLLM's list stays as it is.

    Args:
        vllm_config: The engine's configuration.
        largest: Tokens of the largest graph that may be captured.
    """
    if not is_portable_deepseek_v4(vllm_config):
        return []
    most = vllm_config.scheduler_config.max_num_seqs
    verified = 1 + vllm_config.num_speculative_tokens
    requests = {*range(1, min(most, MOST_REQUESTS) + 1), most}
    return [size for size in sorted(one * verified for one in requests) if size <= largest]
