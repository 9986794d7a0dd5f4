"""FlashMLA, as vLLM calls it for DeepSeek V4, where this installation and this GPU have it."""

from __future__ import annotations

import torch

# FlashMLA has kernels for these alone; vLLM pads the queries.
HEADS = (64, 128)


def available() -> bool:
    """Whether vLLM with FlashMLA's library is installed, on a GPU that it has code for."""
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        return False
    try:
        import vllm.third_party.flashmla.flash_mla_interface  # noqa: F401
    except ImportError:
        return False
    return True


def padded(q: torch.Tensor) -> torch.Tensor:
    """``[T, H, 512]`` with as many heads as FlashMLA takes, zeros where there were none."""
    heads = min(h for h in HEADS if h >= q.shape[1])
    if heads == q.shape[1]:
        return q
    wide = q.new_zeros(q.shape[0], heads, q.shape[2])
    wide[:, : q.shape[1]] = q
    return wide


class Decode:
    """``flash_mla_with_kvcache`` on the arguments of ``sparse_mla_decode``; call it as often.

    The scheduler's metadata is made by the first call, as in vLLM, where the layers of a kind share
    it within a step.
    """

    def __init__(
        self,
        q,
        swa_cache,
        swa_indices,
        swa_lens,
        attn_sink,
        softmax_scale,
        out,
        extra_cache=None,
        extra_indices=None,
        extra_lens=None,
    ) -> None:
        from vllm.third_party.flashmla.flash_mla_interface import get_mla_metadata

        q = padded(q)
        self.out = torch.full_like(q, float("nan"))
        self._heads = out.shape[1]
        self._arguments = dict(
            q=q.unsqueeze(1),
            k_cache=swa_cache.unsqueeze(-2),
            block_table=None,
            cache_seqlens=None,
            head_dim_v=512,
            tile_scheduler_metadata=get_mla_metadata()[0],
            softmax_scale=softmax_scale,
            is_fp8_kvcache=True,
            indices=swa_indices.unsqueeze(1),
            topk_length=swa_lens,
            attn_sink=_padded_sink(attn_sink, q.shape[1]),
            out=self.out.unsqueeze(1),
        )
        if extra_cache is not None:
            self._arguments |= dict(
                extra_k_cache=extra_cache.unsqueeze(-2),
                extra_indices_in_kvcache=extra_indices.unsqueeze(1),
                extra_topk_length=extra_lens,
            )

    def __call__(self) -> torch.Tensor:
        """bfloat16 ``[T, H, 512]``."""
        from vllm.third_party.flashmla.flash_mla_interface import flash_mla_with_kvcache

        flash_mla_with_kvcache(**self._arguments)
        return self.out[:, : self._heads]


class Prefill:
    """``flash_mla_sparse_fwd`` on the arguments of ``sparse_mla_prefill``; call it as often."""

    def __init__(self, q, kv, indices, lens, attn_sink, softmax_scale, out) -> None:
        q = padded(q)
        self.out = torch.full_like(q, float("nan"))
        self._heads = out.shape[1]
        self._arguments = dict(
            q=q,
            kv=kv.unsqueeze(1),
            indices=indices.unsqueeze(1),
            sm_scale=softmax_scale,
            attn_sink=_padded_sink(attn_sink, q.shape[1]),
            topk_length=lens,
            out=self.out,
        )

    def __call__(self) -> torch.Tensor:
        """bfloat16 ``[T, H, 512]``."""
        from vllm.third_party.flashmla.flash_mla_interface import flash_mla_sparse_fwd

        flash_mla_sparse_fwd(**self._arguments)
        return self.out[:, : self._heads]


def _padded_sink(sink: torch.Tensor, heads: int) -> torch.Tensor:
    wide = sink.new_full((heads,), float("-inf"))
    wide[: min(heads, len(sink))] = sink[:heads]
    return wide
