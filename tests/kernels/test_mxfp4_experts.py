import math

import pytest
import torch
from capture import record, replay_on_gpu
from tolerance import assert_close_to_reference, assert_unbiased
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_sm12x.ops.mxfp4_experts import dequantize_mxfp4, mxfp4_experts, reference

# Of the sixteen nibbles (OCP Microscaling formats, table of E2M1).
E2M1 = [
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
]


def pack(codes):
    """Nibbles [..., N] to bytes: the value of even index takes the low nibble."""
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def decode(packed, scale):
    """MXFP4 to float64, value by value."""
    shape = (*packed.shape[:-1], packed.size(-1) * 2)
    values = []
    for row, row_scale in zip(
        packed.flatten(0, -2).tolist(),
        scale.view(torch.uint8).flatten(0, -2).tolist(),
        strict=True,
    ):
        nibbles = [nibble for byte in row for nibble in (byte & 15, byte >> 4)]
        factors = [math.nan if b == 255 else math.ldexp(1.0, b - 127) for b in row_scale]
        values.append([E2M1[code] * factors[i // 32] for i, code in enumerate(nibbles)])
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def draw_weight(*shape, generator, low=118, high=124):
    """A weight [..., N] of about unit gain: packed, and its scales."""
    codes = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    blocks = (*shape[:-1], shape[-1] // 32)
    return pack(codes), torch.randint(low, high, blocks, generator=generator, dtype=torch.uint8)


def draw(num_tokens, experts=5, hidden=64, intermediate=96, top_k=3, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(num_tokens, hidden, generator=g) * spread).bfloat16()
    w13, w13_scale = draw_weight(experts, 2 * intermediate, hidden, generator=g)
    w2, w2_scale = draw_weight(experts, hidden, intermediate, generator=g)
    weights = torch.rand(num_tokens, top_k, generator=g)
    ids = torch.randint(0, experts, (num_tokens, top_k), generator=g, dtype=torch.int32)
    return [x, w13, w13_scale, w2, w2_scale, weights, ids, nan_like(x)]


def nan_like(x):
    return torch.full_like(x, math.nan)


def definition(
    x,
    w13,
    w13_scale,
    w2,
    w2_scale,
    weights,
    ids,
    *,
    limit=None,
    on_input=False,
    expert_map=None,
):
    """Token by token and expert by expert in float64, with no rounding in between.

    Returns the result and the sum of the magnitudes of its terms.
    """
    w13, w2 = decode(w13, w13_scale), decode(w2, w2_scale)
    intermediate = w2.size(2)
    expected = torch.zeros(x.shape, dtype=torch.float64)
    magnitude = torch.zeros_like(expected)
    for t in range(ids.size(0)):
        for k in range(ids.size(1)):
            expert, weight = int(ids[t, k]), weights[t, k].item()
            if expert_map is not None:
                expert = int(expert_map[expert])
            if expert < 0:
                continue
            row = x[t].double()
            gate, up = (
                w13[expert, :intermediate] @ row,
                w13[expert, intermediate:] @ row,
            )
            if on_input:
                gate, up = gate * weight, up * weight
            # Float32 sums of gate and up may be off by as much, unless the limit hides it.
            size = (w13[expert].abs() @ row.abs()).view(2, -1) * (abs(weight) if on_input else 1)
            off = size * (x.size(1) + 1) * 2.0**-24
            gate_off = cut(gate + off[0], limit) - cut(gate - off[0], limit)
            up_off = cut(up + off[1], limit, both=True) - cut(up - off[1], limit, both=True)
            gate, up = cut(gate, limit), cut(up, limit, both=True)
            silu = gate / (1 + torch.exp(-gate))
            result_weight = 1.0 if on_input else weight
            expected[t] += result_weight * (w2[expert] @ (silu * up))
            # The slope of silu is below 1.1.
            activation_off = 1.1 * gate_off * (up.abs() + up_off) + silu.abs() * up_off
            bound = (silu * up).abs() + activation_off / ACTIVATION_ROUNDING
            magnitude[t] += abs(result_weight) * (w2[expert].abs() @ bound)
    return expected, magnitude


# What the tolerance allows for a rounding of the activation to bfloat16, a part of its size.
ACTIVATION_ROUNDING = 2.0**-8


def cut(value, limit, both=False):
    if limit is None:
        return value
    return value.clamp(-limit if both else None, limit)


def check(arguments, **options):
    renamed = {"limit": "swiglu_limit", "on_input": "apply_router_weight_on_input"}
    given = {renamed.get(name, name): value for name, value in options.items()}
    mxfp4_experts(*arguments, **given)
    compare(arguments, **options)


def compare(arguments, **options):
    x, out = arguments[0], arguments[7]
    expected, magnitude = definition(*arguments[:7], **options)
    intermediate = arguments[3].size(2) * 2
    assert_close_to_reference(
        out,
        expected,
        dtype=torch.bfloat16,
        reduction_length=x.size(1) + intermediate + arguments[6].size(1) + 8,
        scale=magnitude,
        # The activation is rounded between the two products.
        operand_dtype=torch.bfloat16,
    )


def test_every_byte_of_weights():
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scale = torch.full((16, 1), 127, dtype=torch.uint8)
    values = dequantize_mxfp4(packed, scale, torch.float32).view(256, 2)
    for byte in range(256):
        assert values[byte].tolist() == [E2M1[byte & 15], E2M1[byte >> 4]]
    # One by hand: 0x2B with scale 2**3 is low nibble 0xB = -1.5, then high nibble 0x2 = 1.
    packed = torch.tensor([0x2B] + [0] * 15, dtype=torch.uint8)
    scale = torch.tensor([130], dtype=torch.uint8)
    assert dequantize_mxfp4(packed, scale)[:3].tolist() == [-12.0, 8.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_dequantize_is_exact_at_every_scale(dtype, scale_dtype):
    codes = torch.arange(32).repeat(255, 1) % 16
    scale = torch.arange(255, dtype=torch.uint8)[:, None]
    values = dequantize_mxfp4(pack(codes), scale.view(scale_dtype), dtype)
    assert values.dtype == dtype
    expected = decode(pack(codes), scale)
    # 2 and more times 2**127 are infinite in either type.
    expected[expected.abs() >= 2.0**128] *= math.inf
    assert torch.equal(values.double(), expected)
    assert torch.equal(values.signbit(), expected.signbit())


def test_dequantize_takes_nan_scales_and_strides():
    g = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (48, 3, 2), generator=g, dtype=torch.uint8).permute(1, 2, 0)
    scale = torch.randint(0, 254, (3, 3, 2), generator=g, dtype=torch.uint8).permute(1, 2, 0)
    scale[1, 0, 2] = 255
    values, expected = (
        dequantize_mxfp4(packed, scale, torch.float32),
        decode(packed, scale),
    )
    assert values[1, 0, 64:].isnan().all()
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.double().nan_to_num(), expected.nan_to_num())
    assert dequantize_mxfp4(packed[:0], scale[:0]).shape == (0, 2, 96)


def test_transformers_dequantizes_alike():
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    packed, scale = draw_weight(3, 8, 64, generator=torch.Generator().manual_seed(1))
    # Theirs gives the transpose.
    expected = theirs.convert_moe_packed_tensors(packed.view(3, 8, 2, 16), scale)
    assert torch.equal(dequantize_mxfp4(packed, scale), expected.transpose(1, 2))


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 33])
@pytest.mark.parametrize("limit", [None, 2.0])
def test_equals_definition(num_tokens, limit):
    check(draw(num_tokens, seed=num_tokens), limit=limit)


@pytest.mark.parametrize(
    ("experts", "hidden", "intermediate", "top_k"),
    [(1, 32, 32, 1), (2, 128, 32, 2), (64, 32, 64, 6), (3, 96, 160, 8)],
)
def test_equals_definition_at_other_shapes(experts, hidden, intermediate, top_k):
    check(draw(7, experts, hidden, intermediate, top_k))


def test_router_weight_on_input():
    arguments = draw(9)
    check(arguments, on_input=True, limit=1.0)
    at_the_end = nan_like(arguments[0])
    mxfp4_experts(*arguments[:7], at_the_end, swiglu_limit=1.0)
    assert not torch.allclose(arguments[7], at_the_end)


def test_equals_transformers_experts():
    theirs = pytest.importorskip(
        "transformers.models.deepseek_v4.modeling_deepseek_v4",
        reason="transformers is too old",
    )
    arguments = draw(11, experts=4, hidden=64, intermediate=32, top_k=2, spread=4.0)
    x, w13, w13_scale, w2, w2_scale, weights, ids, out = arguments
    config = theirs.DeepseekV4Config(
        hidden_size=64,
        moe_intermediate_size=32,
        intermediate_size=32,
        n_routed_experts=4,
    )
    config.num_local_experts, config.swiglu_limit = 4, 10.0
    config._experts_implementation = "eager"
    module = theirs.DeepseekV4Experts(config).double()
    with torch.no_grad():
        module.gate_up_proj.copy_(decode(w13, w13_scale))
        module.down_proj.copy_(decode(w2, w2_scale))
        expected = module(x.double(), ids.long(), weights.double())
    mxfp4_experts(*arguments, swiglu_limit=10.0)
    _, magnitude = definition(*arguments[:7], limit=10.0)
    assert_close_to_reference(
        out,
        expected,
        dtype=torch.bfloat16,
        reduction_length=64 + 32 + 10,
        scale=magnitude,
        operand_dtype=torch.bfloat16,
    )


# Hand-computed cases. Weight (row, column, value) of expert `e`, all others zero.


def sparse_experts(experts, entries13, entries2, hidden=32, intermediate=32):
    def build(rows, columns, entries):
        codes = torch.zeros(experts, rows, columns, dtype=torch.uint8)
        for expert, row, column, value in entries:
            codes[expert, row, column] = E2M1.index(value)
        scale = torch.full((experts, rows, columns // 32), 127, dtype=torch.uint8)
        return pack(codes), scale

    w13 = build(2 * intermediate, hidden, entries13)
    return (*w13, *build(hidden, intermediate, entries2))


def run_single(x, experts, weights, ids, **options):
    row = torch.zeros(1, 32).bfloat16()
    row[0, : len(x)] = torch.tensor(x)
    out = nan_like(row)
    ids = torch.tensor([ids], dtype=torch.int32)
    mxfp4_experts(row, *experts, torch.tensor([weights]), ids, out, **options)
    return out[0].tolist()


# silu(32) is 32 in float32: what is missing is below half a unit in its last place.
GATE, UP = 0, 32


def test_clamp_cuts_the_gate_above_and_up_on_both_sides():
    entries = [
        # Intermediate 0: gate -64, up 64. Intermediate 1: gate 64, up -64. 2: gate 64, up 4.
        (0, GATE + 0, 0, -1.0), (0, UP + 0, 0, 1.0),
        (0, GATE + 1, 0, 1.0), (0, UP + 1, 0, -1.0),
        (0, GATE + 2, 0, 1.0), (0, UP + 2, 1, 1.0),
    ]  # fmt: skip
    experts = sparse_experts(1, entries, [(0, i, i, 1.0) for i in range(3)])
    out = run_single([64.0, 4.0], experts, [1.0], [0], swiglu_limit=32.0)
    # silu(-64) is below 1e-26, and is not cut to silu(-32), which is 4e-13.
    assert out[1:3] == [-1024.0, 128.0]
    assert -1e-24 < out[0] < -1e-26
    assert run_single([64.0, 4.0], experts, [1.0], [0])[1:3] == [-4096.0, 256.0]


def test_activation_alone_is_rounded_between_the_products():
    # Up is 256 + 1 = 257, which is no bfloat16; gate is 37. 37 * 257 = 9509 rounds to 9536, where
    # 37 * 256 = 9472 would be the result of a rounded up. The second product takes 9472 away.
    entries = [
        (0, GATE + 0, 0, 1.0), (0, UP + 0, 1, 1.0), (0, UP + 0, 2, 1.0),
        (0, GATE + 1, 0, 1.0), (0, UP + 1, 1, 1.0),
    ]  # fmt: skip
    experts = sparse_experts(1, entries, [(0, 5, 0, 1.0), (0, 5, 1, -1.0), (0, 6, 0, 1.0)])
    out = run_single([37.0, 256.0, 1.0], experts, [1.0], [0])
    assert out[5:7] == [9536.0 - 9472.0, 9536.0]


def test_experts_are_summed_before_the_rounding():
    # Expert 0 gives 64 * 128 + 1 = 8193, which is no bfloat16, and expert 1 takes 8192 away.
    entries = [
        (0, GATE + 0, 0, 1.0), (0, UP + 0, 1, 1.0), (0, GATE + 1, 0, 1.0), (0, UP + 1, 2, 1.0),
        (1, GATE + 0, 0, 1.0), (1, UP + 0, 1, 1.0),
    ]  # fmt: skip
    experts = sparse_experts(2, entries, [(0, 3, 0, 1.0), (0, 3, 1, 1.0), (1, 3, 0, -1.0)])
    x = [64.0, 128.0, 1 / 64]
    assert run_single(x, experts, [1.0, 1.0], [0, 1])[3] == 1.0
    # The router's weights are not rounded either: 1 + 2**-13 is no bfloat16.
    assert run_single(x, experts, [1.0, 1 + 2.0**-13], [0, 1])[3] == 0.0


def test_duplicate_experts_add_up():
    arguments = draw(4, top_k=2)
    arguments[6][:, 1] = arguments[6][:, 0]
    check(arguments)
    single, out = arguments[:7], nan_like(arguments[0])
    single[5], single[6] = arguments[5].sum(1, keepdim=True), arguments[6][:, :1]
    mxfp4_experts(*single, out)
    torch.testing.assert_close(arguments[7], out, atol=0, rtol=2**-7)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 70])
def test_all_tokens_on_one_expert(num_tokens):
    arguments = draw(num_tokens, top_k=2)
    arguments[6].fill_(3)
    check(arguments)


def test_many_rows_and_tiles():
    # Tiles of more than the smallest size, an expert that fills many, and experts that none takes.
    arguments = draw(300, experts=6, hidden=32, intermediate=32, top_k=2)
    arguments[6][:200] = 4
    arguments[6][200:] %= 3
    assert reference.plan(300, 2, 6, 32, 32, 4).rows == 256
    check(arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_expert_map(dtype):
    arguments = draw(13, experts=3)
    arguments[6] = torch.randint(0, 7, (13, 3), generator=torch.Generator().manual_seed(2))
    arguments[6][5] = torch.tensor([0, 2, 5])
    arguments[6] = arguments[6].to(dtype)
    expert_map = torch.tensor([-1, 2, -1, 0, 1, -1, -1], dtype=torch.int32)
    check(arguments, expert_map=expert_map)
    assert (arguments[7][5] == 0).all()


def test_ids_that_name_no_expert_add_nothing():
    arguments = draw(6, experts=3)
    arguments[5][2] = math.nan
    arguments[6][2] = torch.tensor([-1, 3, 100])
    arguments[6][4, 1] = -1
    out, ids = arguments[7], arguments[6]
    mxfp4_experts(*arguments)
    expected = nan_like(arguments[0])
    mapped = torch.tensor([0, 1, 2, -1], dtype=torch.int32)
    other = ids.clone()
    other[(ids < 0) | (ids > 2)] = 3
    mxfp4_experts(*arguments[:6], other, expected, expert_map=mapped)
    assert torch.equal(out, expected)
    assert (out[2] == 0).all() and out.isfinite().all()
    # Nor do those that the map does not reach.
    mapped_out = nan_like(expected)
    mxfp4_experts(*arguments[:7], mapped_out, expert_map=mapped[:3])
    assert torch.equal(mapped_out, expected)


def test_nan_of_others_does_not_leak():
    arguments = draw(8, experts=6, top_k=2)
    x, _, w13_scale, _, w2_scale, weights, ids, out = arguments
    ids %= 4
    mxfp4_experts(*arguments)
    clean = out.clone()
    # Experts that no token takes, a token, and the weight of an expert that lives elsewhere.
    w13_scale[4:], w2_scale[4:] = 255, 255
    x[3] = math.nan
    mxfp4_experts(*arguments)
    others = torch.arange(8) != 3
    assert out[3].isnan().all()
    assert torch.equal(out[others], clean[others])
    expert_map = torch.full((6,), -1, dtype=torch.int32)
    expert_map[:3] = torch.arange(3)
    weights[ids == 3] = math.nan
    mxfp4_experts(*arguments, expert_map=expert_map)
    assert out[others].isfinite().all()


def test_nan_of_a_taken_expert_shows():
    arguments = draw(8, experts=3, top_k=1)
    arguments[2][1, 5, 0] = 255
    mxfp4_experts(*arguments)
    taken = (arguments[6] == 1).flatten()
    assert taken.any() and not taken.all()
    assert torch.equal(arguments[7].isnan().all(1), taken)
    assert torch.equal(arguments[7].isnan().any(1), taken)


def test_scales_at_both_ends():
    arguments = draw(5, spread=2.0**100)
    arguments[2].fill_(0)  # 2**-127
    arguments[4].fill_(127 + 40)
    check(arguments)
    assert (arguments[7] != 0).any()


def test_huge_activations_are_cut():
    arguments = draw(5, spread=1e20)
    check(arguments, limit=10.0)
    assert arguments[7].isfinite().all()


def test_strided_arguments():
    arguments = draw(6)
    mxfp4_experts(*arguments)
    x, w13, w13_scale, w2, w2_scale, weights, ids, expected = arguments

    def spaced(tensor):
        """The same values, with rows twice as far apart."""
        storage = torch.zeros(*tensor.shape[:-1], 2 * tensor.size(-1), dtype=tensor.dtype)
        view = storage[..., : tensor.size(-1)]
        view.copy_(tensor)
        assert not view.is_contiguous()
        return view

    out = spaced(nan_like(x))
    transposed = [scale.mT.contiguous().mT for scale in (w13_scale, w2_scale)]
    mxfp4_experts(
        spaced(x), spaced(w13), transposed[0], spaced(w2), transposed[1].view(torch.float8_e8m0fnu),
        weights.t().contiguous().t(), ids.long().t().contiguous().t(), out,
    )  # fmt: skip
    assert torch.equal(out, expected)


@pytest.mark.parametrize("attribute", ["RESULT_BUDGET_BYTES", "TILE_BUDGET_BYTES"])
def test_chunks_give_the_same(attribute, monkeypatch):
    whole = reference.plan(40, 3, 5, 64, 96, 4)
    assert whole.token_chunk == 40 and whole.tile_batch == whole.tiles > 1
    monkeypatch.setattr(reference, attribute, 1)
    cut = reference.plan(40, 3, 5, 64, 96, 4)
    assert (cut.token_chunk == 1) if attribute.startswith("RESULT") else (cut.tile_batch == 1)
    check(draw(40), limit=1.0)


def test_scratch_is_what_the_plan_says(monkeypatch):
    arguments = draw(40, hidden=256, intermediate=256)
    monkeypatch.setattr(reference, "TILE_BUDGET_BYTES", 3 * 2**20)
    cut = reference.plan(40, 3, 5, 256, 256, 4)
    assert 1 < cut.tile_batch < cut.tiles
    held = record(mxfp4_experts, *arguments, swiglu_limit=1.0).peak_bytes
    # Which pair goes where, and the table of bytes, come on top: they are small.
    assert 0.5 * cut.scratch_bytes < held <= cut.scratch_bytes + 2**16


def test_uneven_chunks(monkeypatch):
    monkeypatch.setattr(reference, "RESULT_BUDGET_BYTES", 15 * 3 * 64 * 4)
    # Three chunks of at most 15 tokens: 14, 14 and 12.
    assert reference.plan(40, 3, 5, 64, 96, 4).token_chunk == 14
    check(draw(40))


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 512, 8192])
@pytest.mark.parametrize("intermediate", [512, 2048])
def test_real_shapes_stay_within_the_budgets(num_tokens, intermediate):
    cut = reference.plan(num_tokens, 6, 256, 4096, intermediate, 2)
    row = 4096 * 4
    assert cut.result_bytes <= reference.RESULT_BUDGET_BYTES + row
    assert cut.scratch_bytes <= reference.RESULT_BUDGET_BYTES + reference.TILE_BUDGET_BYTES + row
    pairs = cut.token_chunk * 6
    # Room for the worst split of the pairs: one pair in all experts but one.
    hit = min(256, pairs)
    assert cut.tiles >= (hit - 1) + math.ceil((pairs - hit + 1) / cut.rows)
    # The work follows the pairs: at most one dequantised expert a pair, and few beyond the experts.
    assert cut.tiles <= min(pairs, 256 + 2 * pairs / cut.rows)


def test_unbiased():
    arguments = draw(64, hidden=128)
    mxfp4_experts(*arguments)
    expected, _ = definition(*arguments[:7])
    # An error of an activation shows in all of its token's outputs.
    assert_unbiased(arguments[7], expected, slack=0.05)


def test_the_same_work_whatever_the_values():
    def trace(seed, change):
        arguments = draw(9, seed=seed)
        change(arguments)
        expert_map = torch.arange(5, dtype=torch.int32)
        return record(mxfp4_experts, *arguments, swiglu_limit=1.0, expert_map=expert_map).calls

    usual = trace(0, lambda arguments: None)
    assert usual == trace(1, lambda arguments: arguments[6].fill_(2))
    assert usual == trace(2, lambda arguments: arguments[6].fill_(-1))
    assert usual == trace(3, lambda arguments: arguments[0].fill_(math.nan))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (
            0,
            lambda x: x.float(),
            r"hidden_states: dtype torch\.float32, allowed: torch\.bfloat16",
        ),
        (0, lambda x: x[0], r"hidden_states: shape \(64,\), allowed: \(T, H\)"),
        (
            0,
            lambda x: x.t().contiguous().t(),
            r"hidden_states: stride\(-1\) is 4, allowed: 1",
        ),
        (0, lambda x: x.to("meta"), "w13: device cpu, allowed: meta"),
        (
            1,
            lambda w: w.view(torch.int8),
            r"w13: dtype torch\.int8, allowed: torch\.uint8",
        ),
        (
            1,
            lambda w: w[:, :-2],
            r"w13: shape \(5, 190, 32\), allowed: \(E=5, 192, 32\)",
        ),
        (1, lambda w: w[:4], r"w13: shape \(4, 192, 32\), allowed: \(E=5, 192, 32\)"),
        (2, lambda s: s.float(), r"w13_scale: dtype torch\.float32, allowed"),
        (
            2,
            lambda s: s.mT,
            r"w13_scale: shape \(5, 2, 192\), allowed: \(E=5, 192, 2\)",
        ),
        (
            3,
            lambda w: w[:, :32],
            r"w2: shape \(5, 32, 48\), allowed: \(E=5, H=64, any\)",
        ),
        (3, lambda w: w[..., :40], "w2: I is 80, allowed: positive multiples of 32"),
        (3, lambda w: w[:0], "w2: E is 0"),
        (
            4,
            lambda s: s[..., :2],
            r"w2_scale: shape \(5, 64, 2\), allowed: \(E=5, H=64, 3\)",
        ),
        (5, lambda w: w.bfloat16(), r"topk_weights: dtype torch\.bfloat16, allowed"),
        (5, lambda w: w[:, :2], r"topk_weights: shape \(4, 2\), allowed: \(T=4, K=3\)"),
        (
            6,
            lambda i: i.short(),
            r"topk_ids: dtype torch\.int16, allowed: torch\.int32",
        ),
        (6, lambda i: i[:3], r"topk_ids: shape \(3, 3\), allowed: \(T=4, K=3\)"),
        (7, lambda o: o[:3], r"out: shape \(3, 64\), allowed: \(T=4, H=64\)"),
        (7, lambda o: o.half(), r"out: dtype torch\.float16, allowed: torch\.bfloat16"),
        (7, lambda o: None, "out: expected a tensor, got NoneType"),
    ],
)
def test_bad_argument_is_named(index, change, message):
    arguments = draw(4)
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=message):
        mxfp4_experts(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"swiglu_limit": 0.0},
            "swiglu_limit: 0.0, allowed: a positive number or None",
        ),
        ({"swiglu_limit": math.nan}, "swiglu_limit: nan, allowed"),
        ({"expert_map": torch.zeros(5)}, r"expert_map: dtype torch\.float32, allowed"),
        (
            {"expert_map": torch.zeros(5, 1).int()},
            r"expert_map: shape \(5, 1\), allowed: \(any\)",
        ),
        ({"expert_map": torch.zeros(0).int()}, r"expert_map: shape \(0,\), allowed"),
    ],
)
def test_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        mxfp4_experts(*draw(4), **options)


@pytest.mark.parametrize(
    ("packed", "scale", "dtype", "message"),
    [
        ((2, 16), (2, 2), torch.bfloat16, r"scale: shape \(2, 2\), allowed: \(2, 1\)"),
        (
            (2, 24),
            (2, 1),
            torch.bfloat16,
            r"packed: shape \(2, 24\), allowed: .* a multiple of 16",
        ),
        (
            (2, 16),
            (2, 1),
            torch.float16,
            "dtype: torch.float16, allowed: torch.bfloat16",
        ),
    ],
)
def test_bad_packed_weight_is_named(packed, scale, dtype, message):
    with pytest.raises(ValueError, match=message):
        dequantize_mxfp4(
            torch.zeros(packed, dtype=torch.uint8),
            torch.zeros(scale, dtype=torch.uint8),
            dtype,
        )


NAMES = (
    "hidden_states", "w13", "w13_scale", "w2", "w2_scale", "topk_weights", "topk_ids", "out"
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 6, 130])
def test_a_captured_graph_follows_its_inputs(num_tokens):
    first, second = (
        dict(zip(NAMES, draw(num_tokens, hidden=128, seed=seed), strict=True)) for seed in (1, 2)
    )
    limit = {"swiglu_limit": 2.0}
    _, after = replay_on_gpu(mxfp4_experts, first | limit, second | limit)
    compare([*second.values()][:7] + [after["out"]], limit=2.0)


def real_arguments(num_tokens):
    """Of DeepSeek V4 Flash, on the GPU."""
    experts, hidden, intermediate, top_k = 256, 4096, 2048, 6
    gpu = {"device": "cuda"}
    byte = {"dtype": torch.uint8, **gpu}
    return [
        torch.randn(num_tokens, hidden, **gpu).bfloat16(),
        torch.randint(0, 256, (experts, 2 * intermediate, hidden // 2), **byte),
        torch.randint(110, 120, (experts, 2 * intermediate, hidden // 32), **byte),
        torch.randint(0, 256, (experts, hidden, intermediate // 2), **byte),
        torch.randint(110, 120, (experts, hidden, intermediate // 32), **byte),
        torch.rand(num_tokens, top_k, **gpu),
        torch.randint(0, experts, (num_tokens, top_k), dtype=torch.int32, **gpu),
        torch.full((num_tokens, hidden), math.nan, dtype=torch.bfloat16, **gpu),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 64])
def test_real_shapes_on_a_gpu_stay_within_the_plan(num_tokens):
    arguments = real_arguments(num_tokens)
    mxfp4_experts(*arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mxfp4_experts(*arguments)
    held = torch.cuda.max_memory_allocated() - before
    cut = reference.plan(num_tokens, 6, 256, 4096, 2048, 2)
    assert held <= cut.scratch_bytes + 2**20
    assert arguments[7].isfinite().all()


@pytest.mark.parametrize("num_tokens", [1, 16])
def test_runs_on_a_fake_gpu(num_tokens):
    """Devices and shapes fit without values, at the engine's size."""
    with FakeTensorMode():
        expert_map = torch.empty(512, dtype=torch.int32, device="cuda")
        arguments = real_arguments(num_tokens)
        recorder = record(mxfp4_experts, *arguments, swiglu_limit=10.0, expert_map=expert_map)
    products = [shapes for name, shapes in recorder.calls if name == "aten::bmm"]
    cut = reference.plan(num_tokens, 6, 256, 4096, 2048, 2)
    assert products[:2] == [
        ((cut.tile_batch, cut.rows, 4096),),
        ((cut.tile_batch, cut.rows, 4096),),
    ]
