"""The Triton hyper-connection kernels: tables, and real shapes on a GPU; small in ``emulated/``."""

from __future__ import annotations

import math

import pytest
import torch
from capture import record, replay_on_gpu
from mhc_checks import check_fused, check_head, check_our_post, check_pre, check_prenorm_gemm
from test_mhc import fused_arguments
from tolerance import assert_unbiased

from vllm_sm12x.ops import mhc
from vllm_sm12x.ops.mhc.config import (
    CHUNK,
    FINISH_TABLE,
    MIX_TABLE,
    POST_TABLE,
    TARGETS,
    TOKENS,
    configs,
)

M, H = 4, 4096
POST_NAMES = ("x", "residual", "post_layer_mix", "comb_res_mix")
TRITON = dict(implementation="triton")


def test_every_target_has_every_class_of_tokens():
    assert set(TARGETS) == {"sm_90", "sm_120", "sm_121"}
    assert set(POST_TABLE) == set(TARGETS)
    for tables in (MIX_TABLE, FINISH_TABLE):
        assert set(tables) == set(TARGETS)
        for table in tables.values():
            assert set(table) == {*TOKENS, CHUNK}


@pytest.mark.parametrize(
    ("tokens", "name"), [(0, "16"), (16, "16"), (17, "64"), (512, "512"), (513, CHUNK)]
)
def test_the_class_of_a_number_of_tokens(tokens, name):
    found = configs("sm_121", tokens)
    assert found[0] is MIX_TABLE["sm_121"][name] and found[1] is FINISH_TABLE["sm_121"][name]


def test_a_target_without_a_table_is_an_error():
    with pytest.raises(ValueError, match="target: 'sm_80', allowed: sm_120, sm_121, sm_90"):
        configs("sm_80", 1)


def calls(given):
    """Each function with arguments cut from those of the fused one."""
    alone = {name: value for name, value in given.items() if name not in POST_NAMES}
    parts = (
        torch.full((2, len(given["x"]), 24), math.nan),
        torch.full((2, len(given["x"])), math.nan),
    )
    parts = tuple(part.to(given["x"].device) for part in parts)
    return {
        "pre": (mhc.mhc_pre, dict(residual=given["residual"], **alone)),
        "post": (mhc.mhc_post, {name: given[name] for name in POST_NAMES}),
        "fused": (mhc.mhc_fused_post_pre, given),
        "head": (mhc.hc_head, head_arguments(given)),
        "gemm": (
            mhc.hc_prenorm_gemm,
            dict(x=given["residual"].flatten(1), fn=given["fn"], out=parts[0], sqrsum=parts[1],
                 n_splits=2),
        ),
    }  # fmt: skip


def head_arguments(given):
    return dict(
        hidden_states=given["residual"],
        hc_fn=given["fn"][:M],
        hc_scale=given["hc_scale"][:1],
        hc_base=given["hc_base"][:M],
        rms_norm_eps=1e-6,
        hc_eps=1e-6,
    )


@pytest.mark.parametrize("name", ["pre", "post", "fused", "head", "gemm"])
def test_a_bad_choice_is_an_error(name):
    call, arguments = calls(fused_arguments(2, 64, seed=0))[name]
    with pytest.raises(ValueError, match="implementation: 'cuda', allowed: reference, triton"):
        call(**arguments, implementation="cuda")
    with pytest.raises(ValueError, match="device cpu, allowed in the Triton kernels: cuda"):
        call(**arguments, **TRITON)


def test_no_tokens_on_a_cpu_is_an_error_too():
    call, arguments = calls(fused_arguments(0, 64, seed=0))["fused"]
    with pytest.raises(ValueError, match="residual: device cpu, allowed in the Triton kernels"):
        call(**arguments, **TRITON)


def on_gpu(given):
    return {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 17, 24, 64, 65, 300, 600])
def test_the_engines_shape_on_a_gpu(lowered, num_tokens):
    given = on_gpu(fused_arguments(num_tokens, H, seed=num_tokens))
    found = {name: call(**keywords, **TRITON) for name, (call, keywords) in calls(given).items()}
    check_fused(given, found["fused"])
    check_pre(given, found["pre"])
    check_our_post({name: given[name] for name in POST_NAMES}, found["post"])
    assert torch.equal(found["post"], found["fused"][0])
    check_head(head_arguments(given), found["head"])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 24, 700])
@pytest.mark.parametrize("n_splits", [1, 4, 64])
def test_prenorm_gemm_on_a_gpu(lowered, num_tokens, n_splits):
    given = on_gpu(fused_arguments(num_tokens, H, seed=num_tokens))
    x, fn = given["residual"].flatten(1), given["fn"]
    out = torch.full((n_splits, num_tokens, 24), math.nan, device="cuda")
    sqrsum = torch.full((n_splits, num_tokens), math.nan, device="cuda")
    mhc.hc_prenorm_gemm(x, fn, out, sqrsum, n_splits, **TRITON)
    check_prenorm_gemm(x, fn, out, sqrsum)


@pytest.mark.gpu
def test_a_full_chunk_on_a_gpu(lowered):
    given = on_gpu(fused_arguments(4096 + 3, H, seed=7))
    results = mhc.mhc_fused_post_pre(**given, **TRITON)
    check_fused(given, results)
    check_head(head_arguments(given), mhc.hc_head(**head_arguments(given), **TRITON))
    plain = mhc.mhc_pre(**{**calls(given)["pre"][1], "norm_weight": None}, **TRITON)
    expected = mhc.mhc_pre(**{**calls(given)["pre"][1], "norm_weight": None})
    assert_unbiased(plain[2][:, ::97], expected[2][:, ::97].double(), slack=0.02)


@pytest.mark.gpu
def test_nan_stays_with_its_token_on_a_gpu(lowered):
    for num_tokens in (9, 200):
        given = on_gpu(fused_arguments(num_tokens, H, seed=1))
        given["residual"][5, 1, 4000] = math.nan
        expected = torch.arange(num_tokens, device="cuda") == 5
        for result in mhc.mhc_fused_post_pre(**given, **TRITON):
            assert torch.equal(result.isnan().flatten(1).any(1), expected)


@pytest.mark.gpu
def test_streams_beyond_two_to_the_31_elements_on_a_gpu():
    num_tokens = 131_072 + 5
    given = on_gpu(fused_arguments(5, H, seed=1))
    wide = {}
    for name in POST_NAMES:
        shape = (num_tokens, *given[name].shape[1:])
        wide[name] = torch.zeros(shape, dtype=given[name].dtype, device="cuda")
        wide[name][-5:] = given[name]
    results = mhc.mhc_fused_post_pre(**given | wide, **TRITON)
    check_fused(given, [result[-5:] for result in results])
    assert results[0][:-5].eq(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pre", "post", "fused", "head", "gemm"])
def test_the_same_work_whatever_the_values_on_a_gpu(name):
    usual, other = (on_gpu(fused_arguments(3, H, seed=seed)) for seed in (1, 2))
    for value in other.values():
        if isinstance(value, torch.Tensor):
            value.fill_(math.nan)
    traces = []
    for given in (usual, other):
        call, arguments = calls(given)[name]
        traces.append(record(call, **arguments, **TRITON).calls)
    assert traces[0] == traces[1]


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 24, 130])
def test_a_captured_graph_follows_its_inputs(num_tokens):
    first, second = (fused_arguments(num_tokens, H, seed) for seed in (1, 2))
    results, _ = replay_on_gpu(
        lambda **given: mhc.mhc_fused_post_pre(**given, **TRITON), first, second
    )
    check_fused(on_gpu(second), [result.cuda() for result in results])


@pytest.mark.gpu
def test_kernels_that_overlap_wait_for_each_other():
    """A step reads what the step before wrote, many times over, without a pause between them."""
    given = on_gpu(fused_arguments(8, H, seed=3))
    given["comb_res_mix"] = given["comb_res_mix"].softmax(-1)
    chained, alone = dict(given), dict(given)
    for _ in range(200):
        for state in (chained, alone):
            streams, post, comb, layer_input = mhc.mhc_fused_post_pre(**state, **TRITON)
            state |= dict(x=layer_input, residual=streams, post_layer_mix=post, comb_res_mix=comb)
            if state is alone:
                torch.cuda.synchronize()
    for name in POST_NAMES:
        assert torch.equal(chained[name], alone[name])
