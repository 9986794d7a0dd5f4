"""Our kernels against upstream's native ones on the same inputs, where a GPU has both (Hopper).

FlashMLA and DeepGEMM need their libraries alone, TileLang and Marlin all of vLLM. Logits are held
against DeepGEMM in their own test files, with the sets of the largest. Both sides are also held
against the definition: where they part, that says whose error it is.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

from vllm_sm12x.ops.fp8_einsum import fp8_einsum_bhr_hdr
from vllm_sm12x.ops.mxfp4_experts import mxfp4_experts
from vllm_sm12x.ops.sparse_mla import sparse_mla_decode, sparse_mla_prefill

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks
from benchmarks.contest import relative_error
from benchmarks.fp8_einsum import bench_fp8_einsum
from benchmarks.mhc import bench_mhc
from benchmarks.mxfp4_experts import inputs as experts
from benchmarks.sparse_mla import flashmla, inputs

pytestmark = pytest.mark.gpu

# The result is rounded to bfloat16 on both sides (2**-9), and so is something before it: the
# weights of the keys, the activation, the layer's input.
BFLOAT16 = 2**-7


def assert_alike(ours, native, definition, tolerance=BFLOAT16):
    """``ours`` is near ``native``, and no farther from the definition than twice as much."""
    apart = relative_error(ours, native)
    mine, theirs = (relative_error(found, definition) for found in (ours, native))
    seen = f"apart {apart:.2e}; from the definition: ours {mine:.2e}, native {theirs:.2e}"
    assert apart < tolerance, seen
    assert mine < max(2 * theirs, tolerance / 4), seen


@pytest.fixture
def flash_mla():
    if not flashmla.available():
        pytest.skip("no FlashMLA for this GPU")


def ragged(lens: torch.Tensor, seed: int) -> None:
    """Lengths from 1 to what they were, the first and the last one whole."""
    generator = torch.Generator("cuda").manual_seed(seed)
    drawn = torch.rand(len(lens), device="cuda", generator=generator)
    drawn[[0, -1]] = 1
    lens.copy_((drawn * lens).ceil().clamp(min=1))


@pytest.mark.parametrize("heads", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 12, 96])
@pytest.mark.parametrize(("kind", "keys"), [("window", 0), ("c4a", 512), ("c128a", 1024)])
def test_decode_as_flash_mla(lowered, flash_mla, kind, keys, tokens, heads):
    given = inputs.decode(tokens, heads, kind, keys, seed=tokens + heads)
    for number, name in enumerate(("swa_lens", "extra_lens")):
        if name in given:
            ragged(given[name], number)
    if keys:
        given["extra_indices"][:, 5:9] = -1
    native = flashmla.Decode(**given)()
    sparse_mla_decode(**given, implementation="reference")
    definition = given["out"].clone()
    given["out"].fill_(torch.nan)
    sparse_mla_decode(**given, implementation="triton")
    assert_alike(given["out"], native, definition)


@pytest.mark.parametrize("heads", [32, 64, 128])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 640), (300, 640), (300, 1152), (77, 128)])
def test_prefill_as_flash_mla(lowered, flash_mla, tokens, keys, heads):
    given = inputs.prefill(tokens, heads, keys, rows=4096, seed=tokens + keys + heads)
    ragged(given["lens"], 0)
    given["indices"][:, 3:7] = -1
    native = flashmla.Prefill(**given)()
    sparse_mla_prefill(**given, implementation="reference")
    definition = given["out"].clone()
    given["out"].fill_(torch.nan)
    sparse_mla_prefill(**given, implementation="triton")
    assert_alike(given["out"], native, definition)


@pytest.mark.parametrize("tokens", [1, 7, 24, 200, 1025])
def test_einsum_as_deep_gemm(lowered, tokens):
    pytest.importorskip("vllm.third_party.deep_gemm")
    *given, out = bench_fp8_einsum.draw(tokens, seed=tokens)
    bench_fp8_einsum.native()(*given, out)
    native, definition = out.clone(), torch.full_like(out, torch.nan)
    fp8_einsum_bhr_hdr(*given, definition, implementation="reference")
    out.fill_(torch.nan)
    fp8_einsum_bhr_hdr(*given, out, implementation="triton")
    assert_alike(out, native, definition)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 24, 300])
def test_hyper_connections_as_tilelang(lowered, tokens):
    """With DeepGEMM's product, as on Hopper: TileLang's own is wrong from 1,024 tokens on."""
    pytest.importorskip("vllm.model_executor.kernels.mhc.tilelang")
    from vllm_sm12x.lowering import target_key
    from vllm_sm12x.ops.mhc import reference
    from vllm_sm12x.ops.mhc.config import configs

    given = bench_mhc.draw(tokens, seed=tokens)
    *first, weight = given
    native = bench_mhc.tilelang(deep_gemm=True)(given)
    definition = reference.mhc_fused_post_pre(
        *first, *bench_mhc.CONSTANTS, weight, bench_mhc.NORM_EPS
    )
    ours = bench_mhc.ours(given, configs(target_key(), tokens))
    assert len(ours) == len(native) == len(definition)
    for mine, theirs, defined in zip(ours, native, definition, strict=True):
        assert_alike(mine, theirs.reshape(mine.shape), defined.reshape(mine.shape))


@functools.cache
def marlin_layer():
    """The same experts for us, and repacked for Marlin by vLLM's own function."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4

    ours = experts.layer()
    holder = torch.nn.Module()
    holder.params_dtype = torch.bfloat16
    repacked = marlin_utils_fp4.prepare_moe_mxfp4_layer_for_marlin(
        holder, ours.w13, ours.w2, ours.w13_scale, ours.w2_scale, None, None
    )
    return ours, repacked


@pytest.mark.parametrize("tokens", [1, 3, 24, 100, 700])
def test_experts_as_marlin(lowered, tokens):
    marlin_moe = pytest.importorskip("vllm.model_executor.layers.fused_moe.experts.marlin_moe")
    from vllm.scalar_type import scalar_types

    ours, (w13, w2, w13_scale, w2_scale, *_) = marlin_layer()
    batch = experts.batch(tokens, seed=tokens)
    native = marlin_moe.fused_marlin_moe(
        batch.hidden_states,
        w13,
        w2,
        None,
        None,
        w13_scale,
        w2_scale,
        batch.topk_weights,
        batch.topk_ids,
        quant_type_id=scalar_types.float4_e2m1f.id,
        clamp_limit=experts.LIMIT,
    )
    arguments = (batch.hidden_states, ours.w13, ours.w13_scale, ours.w2, ours.w2_scale)
    arguments += (batch.topk_weights, batch.topk_ids)
    definition = torch.full_like(batch.out, torch.nan)
    options = dict(swiglu_limit=experts.LIMIT)
    mxfp4_experts(*arguments, definition, implementation="reference", **options)
    mxfp4_experts(*arguments, batch.out, implementation="triton", **options)
    assert_alike(batch.out, native, definition)
