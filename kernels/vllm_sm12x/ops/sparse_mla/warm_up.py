"""Compiles what sparse MLA launches; see :mod:`vllm_sm12x.ops.launching`."""

from __future__ import annotations

import torch

from vllm_sm12x.lowering import multiprocessors, target_key
from vllm_sm12x.ops.fp8_ds_mla import HEAD_DIM
from vllm_sm12x.ops.launching import one_of_each, stand_in
from vllm_sm12x.ops.sparse_mla import config_decode, sparse_mla_decode, sparse_mla_prefill


def warm_up_decode(
    tokens: int,
    heads: int,
    attn_sink: torch.Tensor,
    swa_cache: torch.Tensor,
    window: int,
    extra_cache: torch.Tensor | None,
    extra_width: int,
) -> None:
    """Call decode once for each choice of kernels that 1 to ``tokens`` tokens take.

    Args:
        tokens: The most tokens of a call.
        heads: ``H``.
        attn_sink, swa_cache, extra_cache: As of the calls.
        window: ``W``.
        extra_width: ``E``; not used without ``extra_cache``.
    """
    target = target_key()
    keys = window if extra_cache is None else window + extra_width

    def kernels(count: int) -> tuple[object, object]:
        row = config_decode.row(count, heads, keys, target)
        splits = config_decode.splits(row, count, heads, keys, multiprocessors())
        return row, config_decode.combine_row(splits) if splits > 1 else None

    for count in one_of_each(range(1, tokens + 1), kernels):
        q = torch.empty(count, heads, HEAD_DIM, dtype=torch.bfloat16, device="meta")
        lens = torch.empty(count, dtype=torch.int32, device="meta")
        extra = {}
        if extra_cache is not None:
            extra = {
                "extra_cache": stand_in(extra_cache),
                "extra_indices": lens.new_empty(count, extra_width),
                "extra_lens": lens,
            }
        sparse_mla_decode(
            q,
            stand_in(swa_cache),
            lens.new_empty(count, window),
            lens,
            stand_in(attn_sink),
            1.0,
            torch.empty_like(q),
            **extra,
            implementation="triton",
        )


def warm_up_prefill(heads: int, attn_sink: torch.Tensor, width: int) -> None:
    """Call prefill once: for a number of heads all calls take one configuration.

    Args:
        heads: ``H``.
        attn_sink: As of the calls.
        width: ``K``.
    """
    tokens = rows = 2
    q = torch.empty(tokens, heads, HEAD_DIM, dtype=torch.bfloat16, device="meta")
    sparse_mla_prefill(
        q,
        q.new_empty(rows, HEAD_DIM),
        torch.empty(tokens, width, dtype=torch.int32, device="meta"),
        torch.empty(tokens, dtype=torch.int32, device="meta"),
        stand_in(attn_sink),
        1.0,
        torch.empty_like(q),
        implementation="triton",
    )
