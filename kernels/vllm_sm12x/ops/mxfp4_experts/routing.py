"""Pairs of a token and an expert, sorted by expert and padded to tiles: vLLM's layout of them.

vLLM's ``moe_align_block_size`` gives three int32 tensors, of sizes that follow from shapes alone:

* ``sorted_token_ids``: pairs ``token * K + slot``, those of one expert beside each other, each
  expert's padded to a multiple of the block size with the number of pairs;
* ``expert_ids``: the expert of each block;
* ``num_tokens_post_padded``, ``[1]``: how many entries of ``sorted_token_ids`` are written.
"""

from __future__ import annotations

from typing import Protocol

import torch

Routing = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Align(Protocol):
    """What sorts pairs by expert, such as vLLM's ``moe_align_block_size``."""

    def __call__(self, topk_ids: torch.Tensor, block_size: int, num_experts: int) -> Routing:
        """The layout above, for int32 ``[T, K]`` of values from 0 to ``num_experts - 1``."""
        ...


def align_block_size(topk_ids: torch.Tensor, block_size: int, num_experts: int) -> Routing:
    """The layout, in plain PyTorch; safe under CUDA-graph capture.

    Args:
        topk_ids: int32 or int64 ``[T, K]``, from 0 to ``num_experts - 1``.
        block_size: Pairs a block.

    Returns:
        ``sorted_token_ids``, ``expert_ids`` (-1 for blocks that nothing needs) and
        ``num_tokens_post_padded``.
    """
    ids = topk_ids.flatten().to(torch.int64)
    pairs, device = ids.numel(), ids.device
    # Each expert that is hit wastes at most block_size - 1 entries.
    blocks = (pairs + min(num_experts, pairs) * (block_size - 1)) // block_size
    sorted_ids, order = torch.sort(ids, stable=True)
    bounds = torch.searchsorted(sorted_ids, torch.arange(num_experts + 1, device=device))
    first_pair, count = bounds[:-1], bounds[1:] - bounds[:-1]
    last_block = ((count + block_size - 1) // block_size).cumsum(0)
    first_block = torch.nn.functional.pad(last_block[:-1], (1, 0))

    place = torch.arange(pairs, device=device) - first_pair[sorted_ids]
    place += first_block[sorted_ids] * block_size
    sorted_token_ids = torch.full((blocks * block_size,), pairs, dtype=torch.int32, device=device)
    sorted_token_ids[place] = order.to(torch.int32)

    block = torch.arange(blocks, device=device)
    expert_ids = torch.searchsorted(last_block, block, right=True)
    expert_ids = torch.where(expert_ids < num_experts, expert_ids, -1).to(torch.int32)
    return sorted_token_ids, expert_ids, (last_block[-1:] * block_size).to(torch.int32)
