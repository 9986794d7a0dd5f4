"""The Triton kernels of the experts: tables, and real shapes on a GPU; small in ``emulated/``."""

from __future__ import annotations

import functools

import mxfp4_unpack
import pytest
import torch
from capture import record, replay_on_gpu
from mxfp4_float8 import check_stages, float8_definition, relative_error
from test_mxfp4_experts import NAMES, compare, draw, real_arguments

from vllm_sm12x.ops.mxfp4_experts import launch, mxfp4_experts
from vllm_sm12x.ops.mxfp4_experts.config import FLOAT8_TABLE, MOST_PAIRS, SUM, TABLE, row
from vllm_sm12x.ops.mxfp4_experts.routing import align_block_size

triton = functools.partial(mxfp4_experts, implementation="triton")


def test_every_target_has_every_kind_of_tile():
    assert set(TABLE) == set(SUM) == {"sm_90", "sm_120", "sm_121"}
    for table in TABLE.values():
        assert set(table) == {"few", "16", "32", "64"}
        assert table["few"].most_pairs == MOST_PAIRS
        assert all(table[kind].most_pairs == 0 for kind in ("16", "32", "64"))


def test_every_target_has_tiles_for_many_pairs_in_float8():
    assert set(FLOAT8_TABLE) == {"sm_90", "sm_120", "sm_121"}
    for table in FLOAT8_TABLE.values():
        assert set(table) == {"16", "32", "64"}
        for of_kind in table.values():
            assert of_kind.most_pairs == 0
            assert of_kind.first.block_k == of_kind.second.block_k == 128
    assert row("sm_120", 257, 256, float8=True) is FLOAT8_TABLE["sm_120"]["16"]


def test_unknown_activations_are_an_error():
    arguments = draw(2)
    with pytest.raises(ValueError, match="activations: 'int8', allowed: bfloat16, float8"):
        mxfp4_experts(*arguments, activations="int8")
    assert arguments[7].isnan().all()


@pytest.mark.parametrize(
    ("pairs", "kind"),
    [
        (1, "few"),
        (256, "few"),
        (257, "16"),
        (8 * 256, "16"),
        (8 * 256 + 1, "32"),
        (24 * 256, "32"),
        (24 * 256 + 1, "64"),
        (10**9, "64"),
    ],
)
def test_the_kind_of_tile_for_a_number_of_pairs(pairs, kind):
    assert row("sm_120", pairs, 256) is TABLE["sm_120"][kind]


def test_a_target_without_a_table_is_an_error():
    with pytest.raises(ValueError, match="target: 'sm_80', allowed: sm_120, sm_121, sm_90"):
        row("sm_80", 1, 1)


def test_an_unknown_implementation_is_an_error():
    arguments = draw(2)
    with pytest.raises(ValueError, match="implementation: 'cuda', allowed: reference, triton"):
        mxfp4_experts(*arguments, implementation="cuda")
    assert arguments[7].isnan().all()


def test_no_gpu_is_an_error():
    arguments = draw(2)
    with pytest.raises(ValueError, match="hidden_states: device cpu, allowed in the Triton"):
        triton(*arguments)
    assert arguments[7].isnan().all()


@pytest.mark.parametrize("tokens", [1, 1000, 8192, 100_000])
def test_chunks_of_tokens_fit_the_budget(tokens):
    chunk = launch.token_chunk(tokens, 6, 4096)
    assert 1 <= chunk <= tokens
    assert chunk * 6 * 4096 * 4 <= launch.RESULT_BUDGET_BYTES
    # No more chunks than the budget asks for, and none much smaller than the others.
    chunks = -(-tokens // chunk)
    assert chunks == -(-tokens * 6 * 4096 * 4 // launch.RESULT_BUDGET_BYTES)
    assert tokens - (chunks - 1) * chunk > chunk // 2
    assert launch.scratch_bytes(tokens, 6, 4096, 2048) == chunk * 6 * (4 * 4096 + 2 * 2048)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("pairs", "experts", "block"), [(1, 1, 16), (5, 40, 8), (300, 7, 16)])
def test_the_routing_is_vllms_layout(pairs, experts, block, dtype):
    ids = torch.randint(0, experts, (pairs, 1), dtype=dtype)
    ids[ids == experts - 2] = 0  # one that nobody takes
    sorted_ids, expert_ids, padded = align_block_size(ids, block, experts)
    assert sorted_ids.dtype == expert_ids.dtype == padded.dtype == torch.int32
    assert sorted_ids.numel() == expert_ids.numel() * block
    expected_ids, expected_experts = [], []
    for expert in range(experts):
        of_expert = (ids.flatten() == expert).nonzero().flatten().tolist()
        blocks = -(-len(of_expert) // block)
        expected_ids += of_expert + [pairs] * (blocks * block - len(of_expert))
        expected_experts += [expert] * blocks
    assert padded.tolist() == [len(expected_ids)]
    assert sorted_ids[: padded.item()].tolist() == expected_ids
    blocks = len(expected_experts)
    assert expert_ids.tolist() == expected_experts + [-1] * (expert_ids.numel() - blocks)
    record(align_block_size, ids, block, experts)


@pytest.mark.gpu
def test_the_device_functions_on_a_gpu(lowered):
    mxfp4_unpack.check_every_byte_at_every_scale("cuda")
    mxfp4_unpack.check_every_byte_in_e4m3("cuda")
    mxfp4_unpack.check_quantize("cuda")


def on_gpu(arguments):
    return [tensor.cuda() for tensor in arguments]


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 200])
@pytest.mark.parametrize("shape", [(64, 96), (128, 256), (512, 544)])
def test_the_definition_on_a_gpu(lowered, num_tokens, shape):
    arguments = draw(num_tokens, 9, *shape, seed=num_tokens)
    given = on_gpu(arguments)
    triton(*given, swiglu_limit=2.0)
    arguments[7] = given[7].cpu()
    compare(arguments, limit=2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [100, 300])
def test_the_definition_with_float8_on_a_gpu(lowered, num_tokens, monkeypatch):
    arguments = draw(num_tokens, 9, 256, 384, seed=num_tokens)
    given = on_gpu(arguments)
    check_stages(monkeypatch, given, limit=2.0)
    expected, _ = float8_definition(arguments, limit=2.0)
    assert relative_error(given[7].cpu(), expected) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [300, 1100, 4096])
def test_real_shapes_with_float8_on_a_gpu(lowered, num_tokens):
    arguments = real_arguments(num_tokens)
    triton(*arguments, swiglu_limit=10.0, activations="float8")
    exact = torch.full_like(arguments[7], torch.nan)
    triton(*arguments[:7], exact, swiglu_limit=10.0)
    assert 0.01 < relative_error(arguments[7], exact) < 0.07


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 24, 42, 43, 300, 700, 1100, 4096, 6000])
def test_real_shapes_equal_the_reference_on_a_gpu(lowered, num_tokens):
    arguments = real_arguments(num_tokens)
    arguments[6] = torch.rand(num_tokens, 256, device="cuda").topk(6).indices.to(torch.int32)
    triton(*arguments, swiglu_limit=10.0)
    expected = torch.full_like(arguments[7], torch.nan)
    mxfp4_experts(*arguments[:7], expected, swiglu_limit=10.0, implementation="reference")
    # Two roundings to bfloat16 whose inputs differ by float32 sums in another order: few elements
    # round the other way.
    assert relative_error(arguments[7], expected) < 2.0**-10
    again = torch.full_like(expected, torch.nan)
    triton(*arguments[:7], again, swiglu_limit=10.0)
    assert torch.equal(again, arguments[7])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [6, 130])
def test_a_captured_graph_follows_its_inputs(lowered, num_tokens):
    first, second = (
        dict(zip(NAMES, draw(num_tokens, hidden=128, seed=seed), strict=True)) for seed in (1, 2)
    )
    limit = {"swiglu_limit": 2.0}
    _, after = replay_on_gpu(triton, first | limit, second | limit)
    compare([*second.values()][:7] + [after["out"]], limit=2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 64, 4096])
def test_memory_stays_within_what_is_stated(num_tokens):
    arguments = real_arguments(num_tokens)
    triton(*arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    triton(*arguments)
    held = torch.cuda.max_memory_allocated() - before
    assert held <= launch.scratch_bytes(num_tokens, 6, 4096, 2048) + 8 * 2**20
    assert arguments[7].isfinite().all()
