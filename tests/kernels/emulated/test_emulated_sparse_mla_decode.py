"""The decode kernels, Triton's and Gluon's, against the definition, as compiled for SM12x."""

from __future__ import annotations

import math

import pytest
import torch
from decode_checks import check_tokens
from pages import LatentPages
from test_sparse_mla import SCALE, Decode, define, rng
from tolerance import assert_unbiased

from vllm_sm12x.lowering import multiprocessors
from vllm_sm12x.ops import sparse_mla
from vllm_sm12x.ops.sparse_mla import config_decode, decode_kernel

ROWS = sorted({row for table in config_decode.TABLE.values() for row in table.values()}, key=repr)


@pytest.fixture(autouse=True, params=["triton", "gluon"])
def kernel(monkeypatch, request):
    """Each test for both kernels."""
    rows = config_decode.TABLE["triton" if request.param == "triton" else "sm_121"]
    monkeypatch.setitem(config_decode.TABLE, "sm_120", rows)


# Around tiles of 16, 32 and 64 keys.
LENS = [0, 33, 64]
EXTRA_LENS = [33, 0, 31]


def run(case: Decode, scale: float = SCALE, **options) -> None:
    sets = [(pages.cache, indices, lens) for pages, indices, lens in case.sets]
    if options:
        decode_kernel.sparse_mla_decode(
            case.q, sets, case.sink, scale, case.out, case.lse, **options
        )
        return
    extra = sets[1] if len(sets) > 1 else ()
    sparse_mla.sparse_mla_decode(
        case.q,
        *sets[0],
        case.sink,
        scale,
        case.out,
        *extra,
        lse=case.lse,
        implementation="triton",
    )


def check(case: Decode, scale: float = SCALE, **options) -> None:
    run(case, scale, **options)
    check_tokens(case.q, case.keys(), case.sink, scale, case.out, case.lse)


@pytest.mark.parametrize("kernel", ["triton"], indirect=True)  # a row says which itself
@pytest.mark.parametrize("splits", [1, 3, 7])
@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_table(row, splits):
    case = Decode(LENS, 128, heads=row.block_h, extra_lens=EXTRA_LENS, extra_width=70)
    check(case, row=row, splits=splits)


@pytest.mark.parametrize(("heads", "splits"), [(8, 64), (16, 2), (32, 2), (64, 1), (128, 1)])
def test_numbers_of_heads(heads, splits):
    case = Decode([31], 128, heads=heads, extra_lens=[1], extra_width=60)
    row = config_decode.row(20, heads, 188, "sm_120")
    check(case, row=row, splits=splits)


@pytest.mark.parametrize("batch", [12, 40])
def test_a_row_is_the_same_in_a_batch_that_is_padded(batch):
    """Three tokens alone would take other programs than three of a batch."""
    lens, extra_lens = [100, 33, 64], [33, 60, 31]
    padding = [0] * (batch - len(lens))
    whole = Decode(lens + padding, 128, extra_lens=extra_lens + padding, extra_width=560)
    run(whole)
    heads, keys = whole.q.shape[1], 128 + 560
    assert chosen(3, heads, keys) != chosen(batch, heads, keys)
    sets = [(pages.cache, indices[:3], lens[:3]) for pages, indices, lens in whole.sets]
    out, lse = torch.full_like(whole.out[:3], math.nan), torch.full_like(whole.lse[:3], math.nan)
    sparse_mla.sparse_mla_decode(
        whole.q[:3],
        *sets[0],
        whole.sink,
        SCALE,
        out,
        *sets[1],
        lse=lse,
        batch_tokens=batch,
        implementation="triton",
    )
    assert torch.equal(out, whole.out[:3])
    assert torch.equal(lse, whole.lse[:3])


def chosen(tokens, heads, keys):
    row = config_decode.row(tokens, heads, keys, "sm_120")
    return row, config_decode.splits(row, tokens, heads, keys, multiprocessors())


@pytest.mark.parametrize("lens", [[1, 31], [32, 65], [100, 128]])
def test_lengths_around_a_tile(lens):
    check(Decode(lens, 128, extra_lens=lens[::-1], extra_width=128), splits=2)


@pytest.mark.parametrize(
    "shape",
    [
        dict(lens=[1], width=1),
        dict(lens=[128, 77], width=128),
        dict(lens=[9, 13], width=13, block_size=2, blocks=50),
        dict(lens=[64, 10], width=130, stride=584 * 64 + 16),
        dict(lens=[128], width=128, extra_lens=[512], extra_width=512, extra_block_size=64),
        dict(lens=[3, 128], width=128, extra_lens=[1, 17], extra_width=8192),
        dict(lens=[-5, 200, 2**31 - 1], width=128, extra_lens=[-1, 9, -(2**31)], extra_width=7),
        dict(lens=[3, 0], width=8, extra_lens=[0, 0], extra_width=0),
        dict(lens=[0, 0], width=0, extra_lens=[2, 0], extra_width=3),
    ],
)
def test_shapes(shape):
    check(Decode(**shape))


def test_pages_that_are_not_aligned(request):
    """The Triton kernel takes them; the Gluon kernel has no copy for them and says so."""
    case = Decode([64, 10], 130, stride=584 * 64 + 8)
    if "gluon" in request.node.callspec.id:
        with pytest.raises(ValueError, match="swa_cache: .*pages 37384 bytes apart, allowed .* 16"):
            run(case)
        assert case.out.isnan().all()
    else:
        check(case)


@pytest.mark.parametrize("kernel", ["gluon"], indirect=True)
def test_threads_that_hold_copies_of_a_sum_agree(kernel):
    """To the last bit, for which of them stores it is left to chance. They seldom differ."""
    more = dict(extra_lens=[512] * 12, extra_width=512, extra_block_size=64)
    check(Decode([128] * 12, 128, heads=64, **more), splits=15)


@pytest.mark.parametrize("splits", [1, 4])
def test_absent_keys(splits):
    case = Decode([100, 128, 128, 50], 128, extra_lens=[0, 40, 3, 40], extra_width=40)
    indices = case.sets[0][1]
    indices[0, 0:100:3] = -1
    indices[0, 1] = 4 * 64  # the first slot beyond the cache
    indices[0, 2] = 2**31 - 1
    indices[0, 4] = -(2**31)
    indices[1, :70] = -1  # whole tiles before the first key
    indices[2, 5:] = -1  # and after the last
    indices[3] = -1
    case.sets[1][1][3] = -1
    case.sink[0], case.sink[1] = -math.inf, 1e30
    check(case, splits=splits)


@pytest.mark.parametrize("splits", [1, 3])
def test_padding_rows(splits):
    """A token without a key gives zeros, whatever its query holds."""
    case = Decode([128, 0, -3], 128, extra_lens=[10, 0, 0], extra_width=16)
    for _, indices, _ in case.sets:
        indices.fill_(-1)
    case.q.fill_(math.nan)
    run(case, splits=splits)
    assert torch.equal(case.out, torch.zeros_like(case.out))
    assert case.lse.eq(-math.inf).all()


@pytest.mark.parametrize("splits", [1, 2])
def test_a_key_named_twice_counts_twice(splits):
    """One-hot keys show each weight as one number of the result."""
    case = Decode([36], 38)
    pages = LatentPages(1, 64)
    for slot in range(4):
        nope = torch.zeros(448, dtype=torch.uint8)
        nope[slot] = 0x38
        exponents = torch.full((7,), 127, dtype=torch.uint8)
        pages.write(slot, nope, exponents, torch.zeros(64).bfloat16())
    # The five entries of note lie in two tiles.
    indices = torch.full((1, 38), -1, dtype=torch.int32)
    indices[0, [0, 1, 2, 3, 35, 36]] = torch.tensor([2, 0, 2, 3, 2, 1], dtype=torch.int32)
    case.sets = [(pages, indices, torch.tensor([36], dtype=torch.int32))]
    case.q.zero_()
    case.sink.fill_(math.log(3.0))
    run(case, splits=splits)
    # Weights 1 for each entry of the five, 3 for the sink.
    expected = torch.zeros(8, 512)
    expected[:, [0, 2, 3]] = torch.tensor([1 / 8, 3 / 8, 1 / 8])
    assert torch.allclose(case.out[0].float(), expected, atol=1e-6)


@pytest.mark.parametrize("splits", [1, 2])
def test_sinks(splits):
    case = Decode([40, 0, 1], 48, extra_lens=[3, 0, 0], extra_width=5)
    case.sink[:8] = torch.tensor([-math.inf, -1e30, -50.0, 0.0, 20.0, 100.0, 1e30, 3.0])
    check(case, splits=splits)


@pytest.mark.parametrize(("magnitude", "splits"), [(0.05, 4), (1.0, 1), (4.0, 1), (4.0, 4)])
def test_realistic_and_peaked_scores(magnitude, splits):
    """Each head looks for a key: queries near keys give scores far apart, the largest anywhere."""
    case = Decode([100, 128], 128, extra_lens=[70, 50], extra_width=70, magnitude=magnitude)
    keys = case.keys()
    for t in range(2):
        for h in range(8):
            direction = keys[t][h * 20] / keys[t][h * 20].norm()
            case.q[t, h] = (magnitude * 22.0 * direction + case.q[t, h].double()).bfloat16()
    check(case, splits=splits)


@pytest.mark.parametrize("scale", [0.25, 1e-3, -SCALE])
def test_the_scale(scale):
    check(Decode([30, 50], 64), scale=scale)


@pytest.mark.parametrize("splits", [1, 2])
def test_scales_at_both_ends(splits):
    """Of E8M0: 2**-127 and 2**120. The queries are zero there, so that the scores stay small."""
    case = Decode([40, 1], 64)
    pages, indices, _ = case.sets[0]
    for slot in set(indices[0, :40].tolist()):
        values, _, scales = pages._places(slot)
        pages.bytes[scales][0] = 0
        pages.bytes[scales][1] = 247
        pages.bytes[values][64:128] = 0x38 + slot % 8  # 1 to 1.875
    case.q[:, :, :128] = 0
    check(case, splits=splits)
    assert case.out[0, :, 64:128].abs().min() > 2.0**119
    assert case.out[0, :, :64].abs().max() < 2.0**-117 and case.out[0, :, :64].abs().max() > 0


@pytest.mark.parametrize("splits", [1, 3])
def test_nan_in_a_key_that_is_named_shows(splits):
    case = Decode([3, 70], 128)
    case.sets[0][1][0, 1] = 0  # page 0 is NaN all over
    case.sets[0][1][1, 66] = 0
    run(case, splits=splits)
    assert case.out.isnan().all()


def test_slots_beyond_two_to_the_31_bytes():
    pages = LatentPages(57_400, 64, untouched=True)
    slots = [57_400 * 64 - 1, 57_390 * 64 + 5]
    for seed, slot in enumerate(slots):
        pages.write_random(slot, rng(seed))
    case = Decode([2], 4)
    indices = torch.tensor([[*slots, 2**31 - 1, -7]], dtype=torch.int32)
    case.sets = [(pages, indices, torch.tensor([2], dtype=torch.int32))]
    check(case)


def test_an_empty_cache_and_an_empty_batch():
    run(Decode([], 8))
    case = Decode([0, 3], 8)
    _, indices, lens = case.sets[0]
    empty = LatentPages(1, 64)
    empty.cache = torch.empty(0, 64, 584, dtype=torch.uint8)
    case.sets = [(empty, indices, lens)]
    run(case)
    assert torch.equal(case.out, torch.zeros_like(case.out))


@pytest.mark.parametrize("splits", [1, 2])
def test_strided_arguments(splits):
    case, plain = Decode([5, 40], 48), Decode([5, 40], 48)
    run(plain, splits=splits)
    wide = torch.full((2, 13, 512), math.nan, dtype=torch.bfloat16)
    wide[:, 2:10] = case.q
    case.q = wide[:, 2:10]
    out = torch.full((2, 11, 512), math.nan, dtype=torch.bfloat16)
    case.out = out[:, 1:9]
    lse = torch.full((8, 5), math.nan)
    case.lse = lse[:, 1:5:2].T
    pages, indices, lens = case.sets[0]
    buffer = torch.full((2, 60), 99_999, dtype=torch.int32)
    buffer[:, :48] = indices
    case.sets = [(pages, buffer[:, :48], torch.stack([lens, lens + 7], 1)[:, 0])]
    case.sink = torch.stack([case.sink, case.sink + 7], 1)[:, 0]
    run(case, splits=splits)
    assert torch.equal(case.out, plain.out) and torch.equal(case.lse, plain.lse)
    assert out[:, 0].isnan().all() and out[:, 9:].isnan().all(), "beside `out`"
    assert lse[:, ::2].isnan().all(), "beside `lse`"


def test_without_lse():
    case, plain = Decode([40], 48), Decode([40], 48)
    for splits in (1, 2):
        run(plain, splits=splits)
        case.lse = None
        run(case, splits=splits)
        assert torch.equal(case.out, plain.out)


def test_scratch_that_is_given():
    case, plain = Decode([5, 40], 48), Decode([5, 40], 48)
    run(plain, splits=2)
    needed = decode_kernel.partial_bytes(2, 8, 2)
    assert needed == 2 * 8 * 2 * (512 + 2) * 4
    scratch = torch.full((needed + 64,), 0xFF, dtype=torch.uint8)  # NaN
    run(case, splits=2, scratch=scratch)
    assert torch.equal(case.out, plain.out)
    assert scratch[needed:].eq(0xFF).all(), "beyond what is stated"
    assert not scratch[:needed].eq(0xFF).all()
    with pytest.raises(ValueError, match=f"scratch: {needed - 4} bytes, allowed: {needed} or more"):
        run(case, splits=2, scratch=scratch[: needed - 4])


def test_results_are_not_biased():
    case = Decode([128, 90], 128, extra_lens=[60, 17], extra_width=60)
    run(case, splits=2)
    expected, _, _ = define(case.q, case.keys(), case.sink, SCALE)
    # Errors of one token and head come from the same rounded weights.
    assert_unbiased(case.out, expected, slack=0.05)


@pytest.mark.parametrize("splits", [1, 3])
def test_slots_that_are_none(splits):
    """Negative ones and ones beyond the cache, in the middle of a tile."""
    case = Decode([0, 5, 33], 40, extra_lens=[0, 3, 40], extra_width=40, extra_block_size=64)
    for _, indices, _ in case.sets:
        indices[2, :20] = torch.tensor([-1, 2**31 - 1, -(2**31), 10**6] * 5, dtype=torch.int32)
    check(case, splits=splits)
