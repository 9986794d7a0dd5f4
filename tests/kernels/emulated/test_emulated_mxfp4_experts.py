"""The Triton kernels of the MXFP4 experts against the definition, as compiled for SM12x."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import mxfp4_unpack
import pytest
import torch
from mxfp4_float8 import check_stages, float8_definition, relative_error
from test_mxfp4_experts import GATE, UP, compare, definition, draw, nan_like, sparse_experts
from tolerance import assert_unbiased

from vllm_sm12x.ops.mxfp4_experts import launch, mxfp4_experts
from vllm_sm12x.ops.mxfp4_experts.config import FLOAT8_TABLE, TABLE, Product, Row

ROWS = sorted({row for rows in TABLE.values() for row in rows.values()}, key=repr)

FLOAT8_ROWS = sorted({row for rows in FLOAT8_TABLE.values() for row in rows.values()}, key=repr)

# Small, so that the emulator is quick: tiles found inside the products, and sorted before.
FEW = Row(16, 32, Product(128, 64, 4, 2), Product(64, 128, 4, 2), dependent=True, lines=2)
SORTED = Row(16, 0, Product(64, 128, 4, 2), Product(64, 64, 4, 2))
HALVES = replace(SORTED, halves=True)
FORMS = pytest.mark.parametrize("row", [FEW, SORTED, HALVES], ids=["few", "sorted", "halves"])

triton = functools.partial(mxfp4_experts, implementation="triton")


def run(arguments, row=None, *, limit=None, on_input=False, expert_map=None, **options):
    if row is None:
        triton(
            *arguments,
            swiglu_limit=limit,
            apply_router_weight_on_input=on_input,
            expert_map=expert_map,
            **options,
        )
    else:
        launch.mxfp4_experts(*arguments, limit, on_input, expert_map, row=row, **options)


def check(arguments, row=None, **options):
    run(arguments, row, **options)
    compare(arguments, **options)


def test_every_byte_at_every_scale():
    mxfp4_unpack.check_every_byte_at_every_scale("cpu")


def test_every_byte_in_e4m3():
    mxfp4_unpack.check_every_byte_in_e4m3("cpu")


def test_the_quantisation_of_activations():
    mxfp4_unpack.check_quantize("cpu")


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_every_row_of_the_table(row):
    check(draw(2, experts=3, hidden=256, intermediate=256, top_k=2), row, limit=2.0)


@FORMS
@pytest.mark.parametrize(
    ("tokens", "experts", "hidden", "intermediate", "top_k"),
    [
        (1, 1, 32, 32, 1),
        (7, 2, 128, 32, 2),
        (5, 9, 32, 64, 6),
        (2, 3, 96, 160, 5),
        (2, 5, 128, 256, 3),
    ],
)
def test_shapes(row, tokens, experts, hidden, intermediate, top_k):
    check(draw(tokens, experts, hidden, intermediate, top_k, seed=tokens), row)


def test_the_public_function_takes_either_form():
    check(draw(3), limit=1.0)
    check(draw(65, experts=6, hidden=32, intermediate=32, top_k=4), limit=1.0)
    out = draw(0)[7]
    run([*draw(0)[:7], out])


@FORMS
def test_router_weight_on_input(row):
    check(draw(5), row, on_input=True, limit=1.0)


@FORMS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_expert_map(row, dtype):
    arguments = draw(6, experts=3)
    arguments[6] = torch.randint(0, 7, (6, 3), generator=torch.Generator().manual_seed(2))
    arguments[6][5] = torch.tensor([0, 2, 5])
    arguments[6] = arguments[6].to(dtype)
    expert_map = torch.tensor([-1, 2, -1, 0, 1, -1, -1], dtype=dtype)
    check(arguments, row, expert_map=expert_map)
    assert (arguments[7][5] == 0).all()


@FORMS
def test_ids_that_name_no_expert_add_nothing(row):
    arguments = draw(5, experts=3)
    arguments[5][2] = math.nan
    arguments[6][2] = torch.tensor([-1, 3, 100])
    arguments[6][4, 1] = -(2**31)
    run(arguments, row)
    expected = arguments[7].clone()
    assert (expected[2] == 0).all() and expected.isfinite().all()
    # As an expert that lives elsewhere, and as one that the map does not reach.
    mapped = torch.tensor([0, 1, 2, -1], dtype=torch.int32)
    ids = arguments[6].clone()
    arguments[6][(ids < 0) | (ids > 2)] = 3
    for expert_map in (mapped, mapped[:3]):
        arguments[7].fill_(math.nan)
        run(arguments, row, expert_map=expert_map)
        assert torch.equal(arguments[7], expected)


@FORMS
def test_all_ids_name_no_expert(row):
    arguments = draw(4, experts=3)
    arguments[6].fill_(-1)
    run(arguments, row)
    assert (arguments[7] == 0).all()


@FORMS
@pytest.mark.parametrize("tokens", [8, 9, 20])
def test_all_tokens_on_one_expert(row, tokens):
    """Tiles of 16 that are full, just more than full, and three."""
    arguments = draw(tokens, experts=4, hidden=32, intermediate=32, top_k=2)
    arguments[6].fill_(3)
    check(arguments, Row(16, 64, row.first, row.second) if row.most_pairs else row)


@FORMS
def test_duplicate_experts_add_up(row):
    arguments = draw(3, top_k=2)
    arguments[6][:, 1] = arguments[6][:, 0]
    check(arguments, row)


@FORMS
def test_nan_of_others_does_not_leak(row):
    arguments = draw(4, experts=6, top_k=2)
    x, _, w13_scale, _, w2_scale, _, ids, out = arguments
    ids %= 4
    run(arguments, row)
    clean = out.clone()
    # Experts that no token takes, and a token.
    w13_scale[4:], w2_scale[4:] = 255, 255
    x[3] = math.nan
    run(arguments, row)
    assert out[3].isnan().all()
    assert torch.equal(out[:3], clean[:3])


@FORMS
@pytest.mark.parametrize("limit", [None, 1.0])
def test_nan_of_a_taken_expert_shows(row, limit):
    arguments = draw(4, experts=3, top_k=1)
    arguments[2][1, 5, 0] = 255
    arguments[6][0], arguments[6][1] = 1, 2
    run(arguments, row, limit=limit)
    taken = (arguments[6] == 1).flatten()
    assert torch.equal(arguments[7].isnan().all(1), taken)
    assert torch.equal(arguments[7].isnan().any(1), taken)


@FORMS
def test_scales_at_both_ends(row):
    arguments = draw(3, spread=2.0**100)
    arguments[2].fill_(0)  # 2**-127
    arguments[4].fill_(127 + 40)
    check(arguments, row)
    assert (arguments[7] != 0).any()


@FORMS
def test_huge_activations_are_cut(row):
    arguments = draw(3, spread=1e20)
    check(arguments, row, limit=10.0)
    assert arguments[7].isfinite().all()


def single(x, experts, weights, ids, row, **options):
    hidden = torch.zeros(1, 32).bfloat16()
    hidden[0, : len(x)] = torch.tensor(x)
    out = nan_like(hidden)
    ids = torch.tensor([ids], dtype=torch.int32)
    run([hidden, *experts, torch.tensor([weights]), ids, out], row, **options)
    return out[0].tolist()


@FORMS
def test_clamp_cuts_the_gate_above_and_up_on_both_sides(row):
    entries = [
        # Intermediate 0: gate -64, up 64. Intermediate 1: gate 64, up -64. 2: gate 64, up 4.
        (0, GATE + 0, 0, -1.0), (0, UP + 0, 0, 1.0),
        (0, GATE + 1, 0, 1.0), (0, UP + 1, 0, -1.0),
        (0, GATE + 2, 0, 1.0), (0, UP + 2, 1, 1.0),
    ]  # fmt: skip
    experts = sparse_experts(1, entries, [(0, i, i, 1.0) for i in range(3)])
    out = single([64.0, 4.0], experts, [1.0], [0], row, limit=32.0)
    assert out[1:3] == [-1024.0, 128.0]
    assert -1e-24 < out[0] < -1e-26
    assert single([64.0, 4.0], experts, [1.0], [0], row)[1:3] == [-4096.0, 256.0]


@FORMS
def test_the_activation_is_rounded_and_the_sum_of_the_experts_before_it_is_not(row):
    # See the reference's tests of the same numbers.
    entries = [
        (0, GATE + 0, 0, 1.0), (0, UP + 0, 1, 1.0), (0, UP + 0, 2, 1.0),
        (0, GATE + 1, 0, 1.0), (0, UP + 1, 1, 1.0),
    ]  # fmt: skip
    experts = sparse_experts(1, entries, [(0, 5, 0, 1.0), (0, 5, 1, -1.0), (0, 6, 0, 1.0)])
    out = single([37.0, 256.0, 1.0], experts, [1.0], [0], row)
    assert out[5:7] == [9536.0 - 9472.0, 9536.0]
    entries = [
        (0, GATE + 0, 0, 1.0), (0, UP + 0, 1, 1.0), (0, GATE + 1, 0, 1.0), (0, UP + 1, 2, 1.0),
        (1, GATE + 0, 0, 1.0), (1, UP + 0, 1, 1.0),
    ]  # fmt: skip
    experts = sparse_experts(2, entries, [(0, 3, 0, 1.0), (0, 3, 1, 1.0), (1, 3, 0, -1.0)])
    x = [64.0, 128.0, 1 / 64]
    assert single(x, experts, [1.0, 1.0], [0, 1], row)[3] == 1.0
    assert single(x, experts, [1.0, 1 + 2.0**-13], [0, 1], row)[3] == 0.0


@FORMS
def test_strided_arguments(row):
    arguments = draw(2, hidden=128, intermediate=128)
    run(arguments, row)
    x, w13, w13_scale, w2, w2_scale, weights, ids, expected = arguments

    def spaced(tensor):
        """The same values, with rows twice as far apart."""
        storage = torch.zeros(*tensor.shape[:-1], 2 * tensor.size(-1), dtype=tensor.dtype)
        view = storage[..., : tensor.size(-1)]
        view.copy_(tensor)
        return view

    # A scale's row of 5 bytes cannot be read four at a time.
    scale = torch.zeros(*w2_scale.shape[:-1], 5, dtype=torch.uint8)[..., :4]
    scale.copy_(w2_scale)
    out = spaced(nan_like(x))
    run(
        [spaced(x), spaced(w13), spaced(w13_scale), spaced(w2), scale.view(torch.float8_e8m0fnu),
         weights.t().contiguous().t(), ids.long().t().contiguous().t(), out],
        row,
    )  # fmt: skip
    assert torch.equal(out, expected)


@FORMS
def test_experts_beyond_two_to_the_31_bytes(row):
    """Their weights and scales; what lies between is never touched, and costs no memory."""
    arguments = draw(3, experts=3, hidden=128, intermediate=128)
    run(arguments, row)
    expected = arguments[7].clone()
    for place in (1, 2, 3, 4):
        tensor = arguments[place]
        apart = 2**30 + 4096
        storage = torch.empty(2 * apart + tensor[0].numel(), dtype=torch.uint8)
        arguments[place] = storage.as_strided(tensor.shape, (apart, *tensor.stride()[1:]))
        arguments[place].copy_(tensor)
    arguments[7].fill_(math.nan)
    run(arguments, row)
    assert torch.equal(arguments[7], expected)


def test_chunks_give_the_same(monkeypatch):
    arguments = draw(5)
    run(arguments, SORTED)
    expected = arguments[7].clone()
    monkeypatch.setattr(launch, "RESULT_BUDGET_BYTES", 2 * 3 * 64 * 4)
    assert launch.token_chunk(5, 3, 64) == 2
    arguments[7].fill_(math.nan)
    run(arguments, SORTED)
    assert torch.equal(arguments[7], expected)


def test_results_are_not_biased():
    arguments = draw(32, hidden=128, intermediate=64)
    run(arguments, SORTED)
    expected, _ = definition(*arguments[:7])
    # An error of an activation shows in all of its token's outputs.
    assert_unbiased(arguments[7], expected, slack=0.05)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: torch.zeros(3, 68).bfloat16()[:, 4:], "hidden_states: address .* 16 bytes"),
        (1, lambda w: torch.zeros(5, 192, 40, dtype=torch.uint8)[..., :32], "w13: address"),
        (3, lambda w: torch.zeros(5, 64, 49, dtype=torch.uint8)[..., 1:], "w2: address"),
        (2, lambda s: s.mT.contiguous().mT, r"w13_scale: stride\(-1\) is 192"),
    ],
)
def test_what_cannot_be_read_is_refused(index, change, message):
    arguments = draw(3)
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=message):
        run(arguments)
    assert arguments[7].isnan().all()


FLOAT8 = Row(16, 0, Product(64, 128, 4, 2), Product(64, 128, 4, 2))


@pytest.mark.parametrize("row", FLOAT8_ROWS, ids=repr)
@pytest.mark.parametrize("on_input", [False, True])
def test_every_row_of_the_table_of_float8(row, on_input):
    check_float8(draw(2, experts=3, hidden=384, intermediate=128, top_k=2), row, on_input=on_input)


def check_float8(arguments, row, **options):
    run(arguments, row, float8=True, **options)
    expected, exact = float8_definition(arguments, **options)
    # An activation near a border may round to its other neighbour.
    assert relative_error(arguments[7], expected) < 0.01
    assert 0.01 < relative_error(arguments[7], exact) < 0.07


def test_float8_leaves_few_pairs_to_bfloat16():
    arguments = draw(2, hidden=128, intermediate=128)
    run(arguments)
    expected = arguments[7].clone()
    run(arguments, activations="float8")
    assert torch.equal(arguments[7], expected)


def test_float8_of_many_pairs():
    arguments = draw(90, experts=4, hidden=128, intermediate=128, top_k=3)
    run(arguments, activations="float8")
    expected, _ = float8_definition(arguments)
    assert relative_error(arguments[7], expected) < 0.01


def test_each_stage_with_float8(monkeypatch):
    check_stages(monkeypatch, draw(90, 4, 128, 128, top_k=3, seed=5), limit=2.0)


def test_nan_and_infinities_show_with_float8():
    arguments = draw(4, experts=3, hidden=128, intermediate=128, top_k=1)
    arguments[0][1, 5], arguments[0][2, 7] = math.nan, math.inf
    arguments[6].copy_(torch.tensor([[0], [0], [0], [1]]))
    arguments[2][1, 5, 0] = 255
    run(arguments, FLOAT8, float8=True)
    assert arguments[7].isnan().any(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((64, 128), "hidden_states: H is 64"), ((128, 96), "w2: I is 96")],
)
def test_a_shape_without_steps_of_128_is_refused_with_float8(shape, message):
    arguments = draw(3, 5, *shape)
    with pytest.raises(ValueError, match=f"{message}, allowed .* multiples of 128"):
        run(arguments, activations="float8")
    assert arguments[7].isnan().all()
