"""Our operations' definitions against ``transformers``, stage by stage, on the tiny checkpoint.

Both get the same operands, already in the narrow formats, so that only the arithmetic is compared.
The definitions give bfloat16, which rounds by up to 2**-8 of a value.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

from tests.oracle.model import Exact, log_probabilities
from tests.oracle.weights import Checkpoint
from vllm_sm12x.ops.fp8_einsum import fp8_einsum_bhr_hdr
from vllm_sm12x.ops.mhc import hc_head, mhc_post, mhc_pre
from vllm_sm12x.ops.mqa_logits import fp8_mqa_logits
from vllm_sm12x.ops.mxfp4_experts import mxfp4_experts
from vllm_sm12x.ops.sparse_mla import sparse_mla_prefill

BF16 = torch.bfloat16


def close_in_bf16(ours: torch.Tensor, exact: torch.Tensor, roundings: int = 1) -> None:
    """Equal but for the rounding of the result, and of sums to either side of a value's edge."""
    assert ours.dtype == BF16
    assert not ours.isnan().any()
    allowed = exact.abs() * 2.0**-8 * roundings + exact.abs().amax() * 1e-5
    assert ((ours.float() - exact).abs() <= allowed).all()


@dataclass
class Captured:
    """What went into one layer, and into its attention function."""

    layer: theirs.DeepseekV4DecoderLayer
    streams: torch.Tensor
    query: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@pytest.fixture(scope="module")
def captured(tiny, sequences) -> list[Captured]:
    """The three layers (window only, C4A, C128A) at the longest sequence."""
    found: list[Captured] = []
    eager = theirs.eager_attention_forward

    class Capturing(Exact):
        def layer(self, layer: Any, streams: torch.Tensor, **inputs: Any) -> torch.Tensor:
            found.append(Captured(layer, streams))
            return super().layer(layer, streams, **inputs)

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        found[-1].query, found[-1].keys, found[-1].mask = query, key, mask
        return eager(module, query, key, value, mask, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "eager_attention_forward", attend)
        list(log_probabilities(Checkpoint(tiny), sequences[-1:], Capturing()))
    return found


@pytest.mark.parametrize("number", [0, 1, 2])
def test_attention_with_window_compressed_keys_and_sinks(captured, number):
    one = captured[number]
    query, keys = one.query.to(BF16), one.keys.to(BF16)
    tokens, rows = query.shape[2], keys.shape[2]
    # With the 68 entries of C4A, the indexer has to leave some out; C128A has two.
    assert rows - tokens == (0, 68, 2)[number]
    exact, _ = theirs.eager_attention_forward(
        one.layer.self_attn, query.float(), keys.float(), keys.float(), one.mask, scaling=512**-0.5
    )
    seen = (one.mask[0, 0] == 0).expand(tokens, rows)
    most = int(seen.sum(1).max())
    assert most == (128, 128 + 32, 128 + 2)[number]
    # The rows that a token sees, in ascending order, and -1 behind them.
    order = torch.where(seen, torch.arange(rows), rows).sort(dim=1).values[:, :most]
    indices = torch.where(order < rows, order, -1).int()
    out = torch.full((tokens, query.shape[1], 512), torch.nan, dtype=BF16)
    sparse_mla_prefill(
        query[0].transpose(0, 1).contiguous(),
        keys[0, 0].contiguous(),
        indices,
        seen.sum(1).int(),
        one.layer.self_attn.sinks.data,
        512**-0.5,
        out,
        implementation="reference",
    )
    close_in_bf16(out, exact[0])


@pytest.mark.parametrize("part", ["attn", "ffn"])
def test_hyper_connections(captured, part):
    one = captured[1]
    mix = getattr(one.layer, f"{part}_hc")
    streams = one.streams.to(BF16)
    post, comb, collapsed = mix(streams.float())
    ours = mhc_pre(
        streams, mix.fn.data, mix.scale.data, mix.base.data, 1e-6, 1e-6, 1e-6, 2.0, 20,
        implementation="reference",
    )  # fmt: skip
    assert torch.allclose(ours[0].squeeze(-1), post, atol=1e-5)
    assert torch.allclose(ours[1], comb, atol=1e-5)
    close_in_bf16(ours[2], collapsed)
    given = torch.randn(collapsed.shape, generator=torch.Generator().manual_seed(5)).to(BF16)
    expected = post.unsqueeze(-1) * given.float().unsqueeze(-2) + torch.matmul(
        comb.transpose(-1, -2), streams.float()
    )
    close_in_bf16(mhc_post(given, streams, *ours[:2], implementation="reference"), expected)


def test_the_final_mix(tiny, captured):
    head = Checkpoint(tiny).layer(0).hc_head
    streams = captured[2].streams.to(BF16)
    ours = hc_head(
        streams, head.hc_fn.data, head.hc_scale.data, head.hc_base.data, 1e-6, 1e-6,
        implementation="reference",
    )  # fmt: skip
    close_in_bf16(ours, head(streams.float()))


def stored(folder, *names):
    with safe_open(next(folder.glob("*.safetensors")), "pt") as shard:
        return [shard.get_tensor(name) for name in names]


def test_experts_from_their_packed_weights(tiny, captured):
    """``transformers`` dequantised them; our definition reads the bytes of the file."""
    experts = captured[1].layer.mlp.experts
    generator = torch.Generator().manual_seed(6)
    # Large enough for the limit of 10 to cut.
    hidden = (torch.randn(40, 256, generator=generator) * 4).to(BF16)
    weights = torch.rand(40, 2, generator=generator)
    ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(40)])

    def packed(*parts):
        names = [[f"layers.1.ffn.experts.{e}.{part}" for part in parts] for e in range(8)]
        return torch.stack([torch.cat(stored(tiny, *one)).view(torch.uint8) for one in names])

    out = torch.full((40, 256), torch.nan, dtype=BF16)
    mxfp4_experts(
        hidden,
        packed("w1.weight", "w3.weight"),
        packed("w1.scale", "w3.scale"),
        packed("w2.weight"),
        packed("w2.scale"),
        weights,
        ids.int(),
        out,
        swiglu_limit=10.0,
        implementation="reference",
    )
    gated = experts._apply_gate
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        # Ours rounds between the two products.
        patch.setattr(experts, "_apply_gate", lambda x: gated(x).to(BF16).float())
        exact = experts(hidden.float(), ids, weights)
    error = (out.float() - exact).abs()
    assert not out.isnan().any()
    # A value on the edge of two bfloat16 values may go either way before the second product.
    assert error.max() < 0.01 * exact.abs().max()
    assert error.median() < 2.0**-8 * exact.abs().median()


def test_the_grouped_output_projection(tiny, captured):
    module = captured[0].layer.self_attn.o_a_proj
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(30, 2, 1024, generator=generator).mul(20).to(torch.float8_e4m3fn)
    scale = torch.exp2(torch.randint(-6, 2, (30, 2, 8), generator=generator).float())
    weight, weight_scale = stored(tiny, "layers.0.attn.wo_a.weight", "layers.0.attn.wo_a.scale")
    out = torch.full((30, 2, 128), torch.nan, dtype=BF16)
    fp8_einsum_bhr_hdr(values, scale, weight, weight_scale, out, implementation="reference")
    with torch.no_grad():
        exact = module(
            (values.float().unflatten(-1, (8, 128)) * scale[..., None]).flatten(-2)[None]
        )
    close_in_bf16(out, exact[0])


def test_the_indexers_scores(captured):
    scorer = captured[1].layer.self_attn.compressor.indexer.scorer
    generator = torch.Generator().manual_seed(8)
    query = torch.randn(50, 16, 128, generator=generator).to(torch.float8_e4m3fn)
    keys = torch.randn(60, 128, generator=generator).to(torch.float8_e4m3fn)
    key_scale = torch.exp2(torch.randint(-3, 3, (60,), generator=generator).float())
    hidden = torch.randn(1, 50, 256, generator=generator)
    with torch.no_grad():
        exact = scorer(query.float()[None], (keys.float() * key_scale[:, None])[None], hidden)[0]
        weights = scorer.weights_proj(hidden)[0] * 16**-0.5 * 128**-0.5
    span = torch.zeros(50, dtype=torch.int32), torch.full((50,), 60, dtype=torch.int32)
    ours = fp8_mqa_logits(query, keys, key_scale, weights, *span)
    assert torch.allclose(ours, exact, atol=1e-4, rtol=1e-5)


def test_the_operands_reach_what_the_names_say(captured):
    """The comparison above would say little of attention over keys that are all alike."""
    for one in captured:
        scores = (one.query @ one.keys.transpose(2, 3))[..., 1:].float() * 512**-0.5
        assert scores.std() > 1.5
