"""DeepSeek V4 Flash's KV cache as vLLM sees it: the layers' specs, the groups, a real manager."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch

# The checkpoint's compress_ratios; the last layer is the MTP layer. 0: window alone.
RATIOS = (0, 0, *((4, 128) * 20), 4, 0)
WINDOW, BLOCK = 128, 256


def layer_specs(mtp: bool = True) -> dict[str, object]:
    """The spec of every cache that a layer registers, in the model's order."""
    from vllm.v1.kv_cache_interface import MLAAttentionSpec, SlidingWindowMLASpec

    def latent(ratio: int, head: int, dtype: torch.dtype, **fields: str) -> object:
        return MLAAttentionSpec(
            block_size=BLOCK,
            num_kv_heads=1,
            head_size=head,
            dtype=dtype,
            compress_ratio=ratio,
            alignment=576,
            **fields,
        )

    def state(block: int, window: int, head: int) -> object:
        return SlidingWindowMLASpec(
            block_size=block,
            num_kv_heads=1,
            head_size=head,
            dtype=torch.float32,
            sliding_window=window,
            alignment=576,
        )

    flash = {"cache_dtype_str": "fp8_ds_mla", "model_version": "deepseek_v4"}
    specs: dict[str, object] = {}
    for number, ratio in enumerate(RATIOS if mtp else RATIOS[:-1]):
        layer = f"model.layers.{number}.attn"
        specs[f"{layer}.swa_cache"] = SlidingWindowMLASpec(
            block_size=64,
            num_kv_heads=1,
            head_size=512,
            dtype=torch.uint8,
            sliding_window=WINDOW,
            alignment=576,
            **flash,
        )
        if ratio:
            specs[f"{layer}.mla_attn"] = latent(ratio, 512, torch.uint8, **flash)
        if ratio == 4:
            specs[f"{layer}.compressor.state_cache"] = state(4, 8, 2048)
            specs[f"{layer}.indexer.k_cache"] = latent(4, 132, torch.uint8)
            specs[f"{layer}.indexer.compressor.state_cache"] = state(4, 8, 512)
        elif ratio == 128:
            specs[f"{layer}.compressor.state_cache"] = state(8, 128, 1024)
    return specs


def scheduler_config(mtp: bool = True, blocks: int = 4096) -> object:
    """What the scheduler is given: vLLM's own groups of these specs."""
    from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config, get_kv_cache_groups
    from vllm.v1.kv_cache_interface import KVCacheConfig

    drafting = SimpleNamespace(use_eagle=lambda: True) if mtp else None
    vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        speculative_config=drafting,
    )
    groups = get_kv_cache_groups(vllm_config, layer_specs(mtp))
    return generate_scheduler_kv_cache_config(
        [KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)]
    )


def manager(mtp: bool = True, blocks: int = 4096) -> object:
    """vLLM's ``KVCacheManager`` over that, with prefix caching."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    return KVCacheManager(
        scheduler_config(mtp, blocks),
        max_model_len=131072,
        max_num_batched_tokens=4096,
        enable_caching=True,
        use_eagle=mtp,
        hash_block_size=4,  # the greatest common divisor of the groups' blocks
    )


@functools.cache
def _start_hashing() -> None:
    """Draw the hash that every chain of block hashes begins with: once, or no two are alike."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash

    init_none_hash(sha256)


def request(name: str, tokens: list[int]) -> object:
    """A request of these prompt tokens, hashed as the manager above asks for."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    _start_hashing()
    sampling = SamplingParams(max_tokens=4096)
    sampling.update_from_generation_config({}, eos_token_id=1)
    return Request(
        request_id=name,
        prompt_token_ids=tokens,
        sampling_params=sampling,
        pooling_params=None,
        block_hasher=get_request_block_hasher(4, sha256),
    )
