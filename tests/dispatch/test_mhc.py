"""The four hyper-connection ops: TileLang and DeepGEMM, or ``vllm_sm12x``.

The ops are registered for CUDA tensors; the functions that they run are called directly here.
"""

from __future__ import annotations

import sys
import types
from unittest.mock import Mock

import pytest
import torch

STREAMS, HIDDEN, REPEAT = 4, 512, 3
ROWS = STREAMS * (2 + STREAMS)
# Large and apart, so that one taken for another shows.
RMS_EPS, PRE_EPS, SINKHORN_EPS, POST, NORM_EPS = 0.5, 0.05, 0.01, 2.0, 0.1
SCALARS = (RMS_EPS, PRE_EPS, SINKHORN_EPS, POST, REPEAT)
KERNELS = (
    "mhc_pre_big_fuse_tilelang",
    "mhc_pre_big_fuse_with_norm_tilelang",
    "mhc_fused_tilelang",
    "mhc_post_tilelang",
    "hc_prenorm_gemm_tilelang",
    "hc_prenorm_gemm_block_m_tilelang",
    "hc_head_fuse_tilelang",
)


def inputs(tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(21)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "residual": normal(tokens, STREAMS, HIDDEN).to(torch.bfloat16),
        "x": normal(tokens, HIDDEN).to(torch.bfloat16),
        "post_mix": torch.rand(tokens, STREAMS, 1, generator=generator),
        "comb_mix": torch.rand(tokens, STREAMS, STREAMS, generator=generator),
        "fn": normal(ROWS, STREAMS * HIDDEN) / 30,
        "scale": torch.tensor([0.7, 1.3, 0.9]),
        "base": normal(ROWS) / 2,
        "norm_weight": (1 + normal(HIDDEN) / 4).to(torch.bfloat16),
        "head_fn": normal(STREAMS, STREAMS * HIDDEN) / 30,
        "head_scale": torch.tensor([1.1]),
        "head_base": normal(STREAMS) / 2,
    }


def expected_post(given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Every new stream is its share of the layer's output plus its mix of the old streams."""
    mixed = torch.einsum("tij,tih->tjh", given["comb_mix"].double(), given["residual"].double())
    return given["post_mix"].double() * given["x"].double().unsqueeze(1) + mixed


def expected_pre(
    residual: torch.Tensor, given: dict[str, torch.Tensor], norm: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    streams = residual.double()
    flat = streams.flatten(1)
    logits = (flat / (flat.square().mean(-1, keepdim=True) + RMS_EPS).sqrt()) @ given[
        "fn"
    ].double().T
    scale, base = given["scale"].double(), given["base"].double()
    pre = torch.sigmoid(logits[:, :4] * scale[0] + base[:4]) + PRE_EPS
    post = POST * torch.sigmoid(logits[:, 4:8] * scale[1] + base[4:8])
    comb = (logits[:, 8:] * scale[2] + base[8:]).view(-1, 4, 4)
    comb = torch.exp(comb - comb.amax(-1, keepdim=True))
    comb = comb / comb.sum(-1, keepdim=True) + SINKHORN_EPS
    comb = comb / (comb.sum(1, keepdim=True) + SINKHORN_EPS)
    for _ in range(REPEAT - 1):
        comb = comb / (comb.sum(2, keepdim=True) + SINKHORN_EPS)
        comb = comb / (comb.sum(1, keepdim=True) + SINKHORN_EPS)
    collapsed = (pre.unsqueeze(-1) * streams).sum(1)
    if norm:
        rms = (collapsed.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()
        collapsed = collapsed / rms * given["norm_weight"].double()
    return post.unsqueeze(-1), comb, collapsed


def expected_head(given: dict[str, torch.Tensor]) -> torch.Tensor:
    flat = given["residual"].double().flatten(1)
    logits = (flat / (flat.square().mean(-1, keepdim=True) + RMS_EPS).sqrt()) @ given[
        "head_fn"
    ].double().T
    weights = torch.sigmoid(logits * given["head_scale"].double() + given["head_base"].double())
    return ((weights + PRE_EPS).unsqueeze(-1) * given["residual"].double()).sum(1)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    half = actual.dtype == torch.bfloat16
    torch.testing.assert_close(
        actual.double(), expected, rtol=2**-6 if half else 1e-4, atol=2e-2 if half else 1e-5
    )


@pytest.fixture
def native(cuda, monkeypatch):
    """Stand-ins for TileLang's kernels and DeepGEMM's, which need a GPU."""
    from vllm.utils import deep_gemm

    module = types.ModuleType("vllm._tilelang_ops")
    for name in KERNELS:
        setattr(module, name, Mock(name=name))
    module.compute_num_split = Mock(return_value=2)
    module.gemm = Mock(name="tf32_hc_prenorm_gemm")
    monkeypatch.setitem(sys.modules, "vllm._tilelang_ops", module)
    monkeypatch.setattr(deep_gemm, "is_deep_gemm_supported", Mock(return_value=True))
    monkeypatch.setattr(deep_gemm, "tf32_hc_prenorm_gemm", module.gemm)
    return module


def called(native: types.ModuleType) -> dict[str, Mock]:
    kernels = {name: getattr(native, name) for name in KERNELS}
    return {name: kernel for name, kernel in kernels.items() if kernel.called}


def same_memory(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.data_ptr() == right.data_ptr() and left.numel() == right.numel()


@pytest.mark.operation("mhc")
@pytest.mark.parametrize("norm", [False, True])
def test_mhc_pre(portable, norm, native):
    from vllm.model_executor.kernels.mhc import tilelang

    given = inputs(5)
    post, comb, layer_input = tilelang.mhc_pre_tilelang(
        given["residual"],
        given["fn"],
        given["scale"],
        given["base"],
        *SCALARS,
        norm_weight=given["norm_weight"] if norm else None,
        norm_eps=NORM_EPS,
    )
    if portable:
        assert not called(native)
        assert not native.gemm.called
        for actual, expected in zip(
            (post, comb, layer_input), expected_pre(given["residual"], given, norm), strict=True
        ):
            assert_near(actual, expected)
        return
    (gemm,) = native.gemm.call_args_list
    flat, fn, products, squares, splits = gemm.args
    assert same_memory(flat, given["residual"])
    assert flat.shape == (5, STREAMS * HIDDEN)
    assert fn is given["fn"]
    assert (products.shape, squares.shape, splits) == ((2, 5, ROWS), (2, 5), 2)
    name = "mhc_pre_big_fuse_with_norm_tilelang" if norm else "mhc_pre_big_fuse_tilelang"
    assert list(called(native)) == [name]
    arguments = getattr(native, name).call_args.args
    assert arguments[0] is products
    assert arguments[1] is squares
    assert arguments[2] is given["scale"]
    assert arguments[3] is given["base"]
    for argument, tensor in zip(
        arguments[4:8], (given["residual"], post, comb, layer_input), strict=True
    ):
        assert same_memory(argument, tensor)
    rest = [HIDDEN, *SCALARS]
    if norm:
        assert arguments[8] is given["norm_weight"]
        assert list(arguments[9:]) == [*rest, NORM_EPS, 2, STREAMS]
    else:
        assert list(arguments[8:]) == [*rest, 2, STREAMS]


@pytest.mark.operation("mhc")
def test_mhc_post(portable, native):
    from vllm.model_executor.kernels.mhc import tilelang

    given = inputs(3)
    out = tilelang.mhc_post_tilelang(
        given["x"], given["residual"], given["post_mix"], given["comb_mix"]
    )
    if portable:
        assert not called(native)
        assert_near(out, expected_post(given))
        return
    assert list(called(native)) == ["mhc_post_tilelang"]
    arguments = native.mhc_post_tilelang.call_args.args
    assert arguments[0] is given["comb_mix"]
    assert arguments[1] is given["residual"]
    assert same_memory(arguments[2], given["post_mix"])
    assert arguments[2].shape == (3, STREAMS)
    assert arguments[3] is given["x"]
    assert arguments[4] is out
    assert arguments[5:] == (STREAMS, HIDDEN)


@pytest.mark.operation("mhc")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tokens", [5, 20])
def test_mhc_fused_post_pre(portable, norm, tokens, native):
    from vllm.model_executor.kernels.mhc import tilelang

    given = inputs(tokens)
    streams, post, comb, layer_input = tilelang.mhc_fused_post_pre_tilelang(
        given["x"],
        given["residual"],
        given["post_mix"],
        given["comb_mix"],
        given["fn"],
        given["scale"],
        given["base"],
        *SCALARS,
        norm_weight=given["norm_weight"] if norm else None,
        norm_eps=NORM_EPS,
    )
    if portable:
        assert not called(native)
        assert not native.gemm.called
        assert_near(streams, expected_post(given))
        for actual, expected in zip(
            (post, comb, layer_input), expected_pre(streams, given, norm), strict=True
        ):
            assert_near(actual, expected)
        return
    # Upstream: one fused kernel up to 16 tokens, three steps above.
    small = tokens <= 16
    fuse = "mhc_pre_big_fuse_with_norm_tilelang" if norm else "mhc_pre_big_fuse_tilelang"
    assert set(called(native)) == {"mhc_fused_tilelang" if small else "mhc_post_tilelang", fuse}
    assert native.gemm.called is not small
    first = (native.mhc_fused_tilelang if small else native.mhc_post_tilelang).call_args.args
    for argument, tensor in zip(
        first[:4],
        (given["comb_mix"], given["residual"], given["post_mix"], given["x"]),
        strict=True,
    ):
        assert same_memory(argument, tensor)
    arguments = getattr(native, fuse).call_args.args
    for argument, tensor in zip(
        arguments[2:8],
        (given["scale"], given["base"], streams, post, comb, layer_input),
        strict=True,
    ):
        assert same_memory(argument, tensor)
    splits = 8 if small else 2
    if norm:
        assert arguments[8] is given["norm_weight"]
        assert list(arguments[9:]) == [HIDDEN, *SCALARS, NORM_EPS, splits, STREAMS]
    else:
        assert list(arguments[8:]) == [HIDDEN, *SCALARS, splits, STREAMS]


@pytest.mark.operation("mhc")
@pytest.mark.parametrize("tokens", [0, 3])
def test_hc_head(portable, tokens, native):
    from vllm.model_executor.kernels.mhc import tilelang

    given = inputs(tokens)
    out = torch.full((tokens, HIDDEN), float("nan"), dtype=torch.bfloat16)
    arguments = (
        given["residual"],
        given["head_fn"],
        given["head_scale"],
        given["head_base"],
        out,
        HIDDEN,
        RMS_EPS,
        PRE_EPS,
        STREAMS,
    )
    assert tilelang._hc_head_fused_kernel_tilelang(*arguments) is None
    if tokens == 0:
        assert not called(native)
    elif portable:
        assert not called(native)
        assert_near(out, expected_head(given))
    else:
        assert list(called(native)) == ["hc_head_fuse_tilelang"]
        native.hc_head_fuse_tilelang.assert_called_once_with(*arguments)
        assert out.isnan().all()


@pytest.mark.operation("mhc")
def test_no_tokens(portable, native):
    from vllm.model_executor.kernels.mhc import tilelang

    given = inputs(0)
    post, comb, layer_input = tilelang.mhc_pre_tilelang(
        given["residual"], given["fn"], given["scale"], given["base"], *SCALARS
    )
    assert post.shape == (0, STREAMS, 1)
    assert comb.shape == (0, STREAMS, STREAMS)
    assert layer_input.shape == (0, HIDDEN)
    out = tilelang.mhc_post_tilelang(
        given["x"], given["residual"], given["post_mix"], given["comb_mix"]
    )
    assert out.shape == (0, STREAMS, HIDDEN)
    assert bool(called(native)) is not portable


def test_a_norm_weight_in_float32_is_used_as_bfloat16(choose, native):
    from vllm.model_executor.kernels.mhc import tilelang

    choose((12, 0), None)
    given = inputs(2)

    def run(weight: torch.Tensor) -> torch.Tensor:
        return tilelang.mhc_pre_tilelang(
            given["residual"],
            given["fn"],
            given["scale"],
            given["base"],
            *SCALARS,
            norm_weight=weight,
            norm_eps=NORM_EPS,
        )[2]

    finer = given["norm_weight"].float() * (1 + 2**-12)
    assert torch.equal(run(finer), run(given["norm_weight"]))


def test_the_ops_that_the_model_calls_run_these_functions(cuda):
    from vllm.model_executor.kernels.mhc import tilelang

    for name in (
        "mhc_pre_tilelang",
        "mhc_post_tilelang",
        "mhc_fused_post_pre_tilelang",
        "hc_head_fused_kernel_tilelang",
    ):
        assert hasattr(torch.ops.vllm, name)
    given = inputs(2)
    meta = {name: tensor.to("meta") for name, tensor in given.items()}
    streams, post, comb, layer_input = torch.ops.vllm.mhc_fused_post_pre_tilelang(
        meta["x"],
        meta["residual"],
        meta["post_mix"],
        meta["comb_mix"],
        meta["fn"],
        meta["scale"],
        meta["base"],
        *SCALARS,
    )
    # The portable path gives what torch.compile was told to expect.
    from vllm_sm12x.ops import mhc

    real = mhc.mhc_fused_post_pre(
        given["x"],
        given["residual"],
        given["post_mix"],
        given["comb_mix"],
        given["fn"],
        given["scale"],
        given["base"],
        *SCALARS,
    )
    for ours, theirs in zip(real, (streams, post, comb, layer_input), strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (
            theirs.shape,
            theirs.dtype,
            theirs.stride(),
        )
    assert tilelang.portable_mhc is mhc
