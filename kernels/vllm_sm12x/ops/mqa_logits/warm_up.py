"""Compiles what the prefill logits launch; see :mod:`vllm_sm12x.ops.launching`."""

from __future__ import annotations

import torch

from vllm_sm12x.ops.mqa_logits import HEAD_DIM, fp8_mqa_logits


def warm_up(heads: int) -> None:
    """Call the operation once: for a number of heads all calls take one configuration."""
    tokens = keys = 2
    int32 = torch.empty(tokens, dtype=torch.int32, device="meta")
    fp8_mqa_logits(
        torch.empty(tokens, heads, HEAD_DIM, dtype=torch.float8_e4m3fn, device="meta"),
        torch.empty(keys, HEAD_DIM, dtype=torch.float8_e4m3fn, device="meta"),
        torch.empty(keys, dtype=torch.float32, device="meta"),
        torch.empty(tokens, heads, dtype=torch.float32, device="meta"),
        int32,
        int32,
        implementation="triton",
    )
