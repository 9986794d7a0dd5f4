"""Compiles what the decode logits launch; see :mod:`vllm_sm12x.ops.launching`."""

from __future__ import annotations

import torch

from vllm_sm12x.lowering import target_key
from vllm_sm12x.ops.launching import one_of_each, stand_in
from vllm_sm12x.ops.paged_mqa_logits import HEAD_DIM, config, fp8_paged_mqa_logits


def warm_up(
    rows: int,
    heads: int,
    kv_cache: torch.Tensor,
    max_model_len: int,
    capability: tuple[int, int],
) -> None:
    """Call the operation once for each configuration that 1 to ``rows`` query tokens take.

    Args:
        rows: The most query tokens of a call, ``B * next_n``.
        heads: Number of heads.
        kv_cache: As of the calls.
        max_model_len: As of the calls.
        capability: Of the GPU.
    """
    target = target_key(capability)
    for count in one_of_each(range(1, rows + 1), lambda r: config.row(r, heads, target)):
        fp8_paged_mqa_logits(
            torch.empty(count, 1, heads, HEAD_DIM, dtype=torch.float8_e4m3fn, device="meta"),
            stand_in(kv_cache),
            torch.empty(count, heads, dtype=torch.float32, device="meta"),
            torch.empty(count, 1, dtype=torch.int32, device="meta"),
            torch.empty(count, 1, dtype=torch.int32, device="meta"),
            max_model_len,
            implementation="triton",
        )
