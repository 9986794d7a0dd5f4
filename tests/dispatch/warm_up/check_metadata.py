"""What vLLM's own metadata builder of the indexer launches for drawn batches.

The warm-up's two runs reach every form of it. Packing, whose kernels compile for each number of
tokens, is asked for only where empty requests pad a full graph, and its code is not run then.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

# Before vLLM: it makes vLLM believe in a GPU.
import sampling
import torch
from launch_keys import recorded

from vllm_sm12x.adapters import mtp, warm_up

CAPABILITY = (12, 0)
HELPERS = {"_compressed_slot_mapping_kernel", "_build_prefill_chunk_metadata_kernel"}
UNIFORM = {"_prepare_uniform_decode_kernel"}


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Iterator[None]:
    with sampling.gpu():
        yield


@pytest.fixture(params=[0, 1, 2, 3])
def drafted(request) -> int:
    return request.param


@pytest.fixture
def worker(tmp_path, drafted) -> SimpleNamespace:
    return sampling.start(tmp_path, drafted, "meta")


@pytest.fixture
def builder(worker) -> Any:
    from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerMetadataBuilder
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    spec = MLAAttentionSpec(
        block_size=256, num_kv_heads=1, head_size=132, dtype=torch.uint8, compress_ratio=4
    )
    return DeepseekV32IndexerMetadataBuilder(
        spec, ["indexer"], worker.vllm_config, torch.device("meta")
    )


def build(builder: Any, lengths: list[int]) -> Any:
    """The metadata of a batch, by the tokens of its requests; no kernel is launched."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    requests, tokens = len(lengths), sum(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    int32 = {"dtype": torch.int32, "device": "meta"}
    return builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=starts.to("meta"),
            query_start_loc_cpu=starts,
            seq_lens=torch.empty(64, **int32)[:requests],
            num_reqs=requests,
            num_actual_tokens=tokens,
            max_query_len=max(lengths),
            max_seq_len=sampling.MAX_MODEL_LEN,
            block_table_tensor=torch.empty(64, 2, **int32)[:requests],
            slot_mapping=torch.empty(2048, dtype=torch.int64, device="meta")[:tokens],
            seq_lens_cpu_upper_bound=torch.tensor([length + 100 for length in lengths]),
        ),
    )


def batches(drafted: int) -> Iterator[list[int]]:
    """Decoding requests of one length and of several, then prompts: short ones too."""
    draw = random.Random(20261123)
    for requests in range(1, 61):
        yield [1 + drafted] * requests
        yield [draw.randrange(1, 2 + drafted)] * requests
    for _ in range(200):
        decodes = draw.choices(range(1, 2 + drafted), k=draw.randrange(40))
        prompts = [draw.choice([1, 2, 16, 17, 99]) for _ in range(draw.randrange(4))]
        if decodes or prompts:
            yield decodes + prompts


def test_no_batch_packs_or_compiles(worker, builder, drafted):
    with recorded(CAPABILITY) as asked:
        packed = [
            lengths
            for lengths in batches(drafted)
            if (decode := build(builder, lengths).decode) is not None and decode.requires_padding
        ]
    assert packed == []
    assert asked.kernels == HELPERS | (UNIFORM if drafted > 1 else set())
    run = worker.model_runner._dummy_run = Mock()
    warm_up.warm_up_mixed_batch(worker)
    mtp.warm_up_uniform_decode(worker)
    # Between them is one of a single token, without attention.
    mixed, one, *uniform = [call.args[0] for call in run.call_args_list]
    assert (one, "force_attention" in run.call_args_list[1].kwargs) == (1, False)
    assert len(uniform) == min(drafted, 1)
    with recorded(CAPABILITY) as made:
        build(builder, [1] * (mixed // 2) + [mixed - mixed // 2])
        for tokens in uniform:
            build(builder, [1 + drafted] * (tokens // (1 + drafted)))
    assert asked.missing_from(made) == []


def test_a_padded_graph_asks_for_packing(builder, drafted):
    """Only flattened batches do without."""
    with recorded(CAPABILITY):
        decode = build(builder, [1 + drafted] * 3 + [0, 0]).decode
    assert decode.requires_padding == (drafted < 2)
