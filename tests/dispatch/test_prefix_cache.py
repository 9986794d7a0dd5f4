"""Prefix-cache hits of DeepSeek V4 Flash with MTP, on vLLM's own KV-cache manager and groups."""

from __future__ import annotations

import random

import pytest

from tests.dispatch import flash_cache

# Cache hits are multiples of this: the least common multiple of the groups' blocks (256, 64, 4, 8).
BOUNDARY = 256
DRAFTED = 2


def draw(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(2, 129_280), k=count)


def serve(manager: object, name: str, tokens: list[int], answer: int = 0, chunk: int = 4096) -> int:
    """Read a prompt in chunks, decode ``answer`` tokens, finish; the tokens that were cached.

    A decode step computes one token and two drafts, and one, two or three of them are kept.
    """
    request = flash_cache.request(name, tokens)
    blocks, hit = manager.get_computed_blocks(request)
    new_blocks, new_tokens = blocks, hit
    request.num_computed_tokens = hit
    while request.num_computed_tokens < request.num_prompt_tokens:
        count = min(chunk, request.num_prompt_tokens - request.num_computed_tokens)
        assert manager.allocate_slots(
            request, count, new_tokens, new_blocks, num_lookahead_tokens=DRAFTED
        )
        new_blocks, new_tokens = None, 0
        request.num_computed_tokens += count
    answered = draw(len(tokens), answer)
    while answered:
        kept, answered = answered[: 1 + len(answered) % 3], answered[1 + len(answered) % 3 :]
        request.append_output_token_ids(kept[0])
        assert manager.allocate_slots(request, 1 + DRAFTED, num_lookahead_tokens=DRAFTED)
        request.append_output_token_ids(kept[1:])
        request.num_computed_tokens += len(kept)
    manager.free(request)
    return hit


def up_to_boundary(tokens: int) -> int:
    return tokens // BOUNDARY * BOUNDARY


def test_the_groups_are_those_of_the_model(cuda):
    config = flash_cache.scheduler_config()
    drawn = [
        (group.kv_cache_spec.block_size, getattr(group.kv_cache_spec, "sliding_window", None))
        for group in config.kv_cache_groups
    ]
    assert drawn == [(256, None), (64, 128), (64, 128), (4, 8), (8, 128)]
    # The MTP layer's group; the other window group has the same spec and is looked up with it.
    assert [group.is_eagle_group for group in config.kv_cache_groups] == [
        *(False, False, True),
        *(False, False),
    ]
    window = [group.kv_cache_spec for group in config.kv_cache_groups[1:3]]
    assert window[0] == window[1]


@pytest.mark.operation("mhc")
def test_a_shared_prefix_hits_on_the_portable_path(case, choose):
    choose(case.capability, case.override)
    manager = flash_cache.manager()
    prompt = draw(1, 3000)
    assert serve(manager, "first", prompt) == 0
    again = serve(manager, "again", prompt + draw(2, 50))
    # Upstream's masks keep no block past a boundary.
    portable = case.portable or "," in (case.override or "")
    assert again == (up_to_boundary(3000) if portable else 0)


@pytest.mark.parametrize("shared", [63, 256, 319, 320, 1000, 2000, 2943, 2944, 2999])
@pytest.mark.parametrize("chunk", [256, 1000, 4096])
def test_a_hit_ends_at_the_last_boundary_with_a_block_past_it(choose, shared, chunk):
    choose((12, 0), None)
    manager = flash_cache.manager()
    prompt = draw(1, 3000)
    serve(manager, "first", prompt, chunk=chunk)
    hit = serve(manager, "other", prompt[:shared] + draw(3, 500))
    # Drafting drops one matched window block, of 64 tokens: it must be shared too.
    assert hit == up_to_boundary(max(shared // 64 * 64 - 64, 0))


@pytest.mark.parametrize("answer", [100, 700, 2000])
def test_a_second_turn_hits_the_first_answer(choose, answer):
    choose((12, 0), None)
    manager = flash_cache.manager()
    prompt = draw(1, 3000)
    serve(manager, "turn 1", prompt, answer=answer)
    turn = prompt + draw(3000, answer)
    hit = serve(manager, "turn 2", turn + draw(4, 100))
    # The last token of an answer is never computed, and its block may not be full.
    assert up_to_boundary(len(turn) - 1 - 2 * 64) <= hit <= up_to_boundary(len(turn) - 1)


def test_hits_without_drafting_are_upstreams(choose):
    hits = {}
    for override in ("none", "all"):
        choose((9, 0), override)
        manager = flash_cache.manager(mtp=False)
        prompt = draw(1, 3000)
        hits[override] = [
            serve(manager, "a", prompt, answer=700),
            serve(manager, "b", prompt + draw(3000, 700) + draw(5, 90)),
            serve(manager, "c", prompt[:2000] + draw(6, 90)),
        ]
    assert hits["none"] == hits["all"] == [0, up_to_boundary(3699), up_to_boundary(2000)]


def test_other_drafting_models_keep_upstreams_masks(choose):
    """A model whose draft layer vLLM does not mark: then every group counts as one that drafts."""
    import torch
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        SlidingWindowSpec,
    )

    common = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.bfloat16}
    groups = [
        KVCacheGroupSpec(["full"], FullAttentionSpec(block_size=256, **common)),
        KVCacheGroupSpec(
            ["window"], SlidingWindowSpec(block_size=64, sliding_window=128, **common)
        ),
    ]
    cached = {}
    for override in ("none", "all"):
        choose((12, 0), override)
        manager = KVCacheManager(
            KVCacheConfig(num_blocks=256, kv_cache_tensors=[], kv_cache_groups=groups),
            max_model_len=8192,
            enable_caching=True,
            use_eagle=True,
            hash_block_size=4,
        )
        serve(manager, "a", draw(1, 1024))
        cached[override] = cached_blocks(manager)
    assert cached["none"] == cached["all"] == {0: 4, 1: 8}


def cached_blocks(manager: object) -> dict[int, int]:
    """How many blocks the prefix cache holds, by KV cache group."""
    from vllm.v1.core.kv_cache_utils import get_group_id

    counts: dict[int, int] = {}
    for key in manager.block_pool.cached_block_hash_to_block._cache:
        counts[get_group_id(key)] = counts.get(get_group_id(key), 0) + 1
    return counts


def test_the_window_groups_cache_one_block_more_a_boundary_and_no_more(choose):
    choose((12, 0), None)
    prompt = draw(1, 10 * BOUNDARY)
    manager = flash_cache.manager()
    serve(manager, "a", prompt)
    # Ten boundaries: two blocks before each, and one past each but the last, where nothing follows.
    assert cached_blocks(manager) == {0: 10, 1: 29, 2: 29, 3: 20, 4: 160}
