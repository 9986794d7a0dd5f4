"""Our hyper-connections beside vLLM's TileLang kernels, on identical inputs: both as on SM12x."""

from __future__ import annotations

import math

import nvcc
import pytest
import torch
from mhc_checks import check_fused, check_head, check_prenorm_gemm, define_mix, define_post
from native_kernels import EmulatedStream
from test_mhc import M, draw_mapping, draw_streams, fused_arguments
from tilelang_kernels import emulated_tilelang

from vllm_sm12x.ops import mhc

pytestmark = pytest.mark.skipif(bool(nvcc.missing()), reason=nvcc.missing())

TRITON = dict(implementation="triton")
POST = ("x", "residual", "post_layer_mix", "comb_res_mix")
MIX = ("fn", "hc_scale", "hc_base", "rms_eps")
# TileLang's kernels fit this one of DeepSeek V4 Flash, and few others.
HIDDEN = 4096


@pytest.fixture
def native(monkeypatch):
    """vLLM's module that calls TileLang, and the stream where its kernels run."""
    import vllm.utils.deep_gemm
    from vllm.model_executor.kernels.mhc import tilelang

    # As where DeepGEMM has no kernels.
    monkeypatch.setattr(vllm.utils.deep_gemm, "is_deep_gemm_supported", lambda: False)
    monkeypatch.setattr(tilelang, "portable_enabled", lambda operation: False)
    stream = EmulatedStream()
    with emulated_tilelang(stream):
        yield tilelang, stream


@pytest.mark.parametrize(
    ("num_tokens", "normed", "kernels"),
    [
        (5, True, ["mhc_fused", "mhc_pre_big_fuse_with_norm"]),
        (12, False, ["mhc_fused", "mhc_pre_big_fuse"]),
        (20, True, ["mhc_post", "hc_prenorm_gemm", "mhc_pre_big_fuse_with_norm"]),
    ],
)
def test_fused(native, num_tokens, normed, kernels):
    module, stream = native
    given = fused_arguments(num_tokens, HIDDEN, seed=num_tokens)
    if not normed:
        del given["norm_weight"]
    theirs = module.mhc_fused_post_pre_tilelang(**given)
    assert [launched.kernel for launched in stream.launched] == [
        f"{name}_tilelang_kernel" for name in kernels
    ]
    ours = mhc.mhc_fused_post_pre(**given, **TRITON)
    check_fused(given, theirs)
    check_fused(given, ours)
    # Streams differ where another order of the sum rounds to the other neighbour.
    assert (theirs[0] != ours[0]).double().mean() < 1e-4
    # Far within what the checks allow, each gives the gates of the streams that it mixes: up to 16
    # tokens, TileLang takes them before they are rounded to bfloat16.
    streams, _ = define_post(*(given[name] for name in POST))
    rounded = streams.bfloat16()
    gates, rounded_gates = (gates_of(given, one) for one in (streams, rounded))
    torch.testing.assert_close(
        theirs[1].double(), gates if num_tokens <= 16 else rounded_gates, rtol=0, atol=1e-4
    )
    torch.testing.assert_close(ours[1].double(), rounded_gates, rtol=0, atol=1e-4)
    assert (gates - rounded_gates).abs().max() > 4e-4


def gates_of(given, streams):
    """Weights of the layer's output in each stream, from the definition."""
    logits, _ = define_mix(streams, *(given[name] for name in MIX))
    return given["hc_post_mult_value"] * torch.sigmoid(logits[..., M : 2 * M, None])


def test_head(native):
    module, _ = native
    names = ("hc_fn", "hc_scale", "hc_base")
    given = dict(
        hidden_states=draw_streams(9, M, HIDDEN, seed=4),
        **dict(zip(names, draw_mapping(HIDDEN, seed=5, outputs=M, scales=1), strict=True)),
        rms_norm_eps=0.3,
        hc_eps=0.01,
    )
    out = torch.full((9, HIDDEN), math.nan, dtype=torch.bfloat16)
    module._hc_head_fused_kernel_tilelang(
        given["hidden_states"],
        given["hc_fn"],
        given["hc_scale"],
        given["hc_base"],
        out,
        HIDDEN,
        given["rms_norm_eps"],
        given["hc_eps"],
        M,
    )
    check_head(given, out)
    check_head(given, mhc.hc_head(**given, **TRITON))


@pytest.mark.parametrize(("num_tokens", "form"), [(200, ""), (1024, "_block_m")])
def test_the_gemm(native, num_tokens, form):
    """From 1,024 tokens on TileLang's takes two a block, and clears the sum for the first alone:
    the second has both."""
    module, stream = native
    x = draw_streams(num_tokens, M * 128, seed=1)
    fn, *_ = draw_mapping(128, seed=2)
    theirs = torch.full((1, num_tokens, len(fn)), math.nan), torch.full((1, num_tokens), math.nan)
    module._tilelang_hc_prenorm_gemm(x, fn, *theirs, 128, M)
    assert [one.kernel for one in stream.launched] == [f"hc_prenorm_gemm{form}_tilelang_kernel"]
    product = x.double() @ fn.double().T
    expected = product.clone()
    if form:
        expected[1::2] += product[::2]
    torch.testing.assert_close(theirs[0][0].double(), expected, rtol=1e-4, atol=1e-4)

    ours = tuple(torch.full_like(one, math.nan) for one in theirs)
    mhc.hc_prenorm_gemm(x, fn, *ours, **TRITON)
    check_prenorm_gemm(x, fn, *ours)
