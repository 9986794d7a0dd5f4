"""The compressor's reference: against the definition in float64, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from compressor_checks import Case, check, place_of, prefill

from vllm_sm12x.ops.compressor import compress_to_cache

C4A, C128A = (4, True), (128, False)


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("page_size", [2, 64])
def test_a_prefill_of_overlapping_windows(page_size, spread):
    case = prefill(*C4A, 43, page_size=page_size, spread=spread, unslotted=(11,), padded=(19,))
    assert case.counting() == [3, 7, 15, 23, 27, 31, 35, 39]
    compress_to_cache(**case.arguments)
    check(case)


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_a_prefill_of_long_windows(spread):
    case = prefill(*C128A, 384, block_size=8, spread=spread)
    assert case.counting() == [127, 255, 383]
    compress_to_cache(**case.arguments)
    check(case)


def test_a_decode_batch():
    """A token a request, each somewhere else in its group."""
    case = Case(*C4A, positions=[3, 4, 11, 6, 19, 23], requests=[2, 0, 1, 5, 3, 4], padded=(4,))
    assert case.counting() == [0, 2, 5]
    compress_to_cache(**case.arguments)
    check(case)


def test_nothing_to_do_writes_nothing():
    for tokens in (0, 3):
        case = prefill(*C4A, 3)
        for name in ("token_to_request", "positions", "state_slots", "slots"):
            case.arguments[name] = case.arguments[name][:tokens]
        compress_to_cache(**case.arguments)
        assert case.pages.bytes.eq(0xFF).all()


@pytest.mark.parametrize("name", ["token_to_request", "positions", "state_slots", "slots"])
def test_tokens_beyond_the_shortest_array_are_left_out(name):
    case = prefill(*C4A, 16)
    case.arguments[name] = case.arguments[name][:12]
    compress_to_cache(**case.arguments)
    case.unslotted = (15,)
    check(case)


def case_by_hand() -> Case:
    """All scores are alike, so that an entry is the mean of 1 to 128; its norm is 1 a channel. The
    weight makes 448 of it, the largest e4m3 value; a quarter turn makes (-448, 448) of the pairs.
    """
    case = prefill(*C128A, 128, block_size=8)
    states = case.arguments["state_cache"]
    table = case.arguments["block_table"][0]
    for position in range(128):
        states[table[position // 8], position % 8, :512] = position + 1.0
        states[table[position // 8], position % 8, 512:] = -3.0
    case.arguments["norm_weight"] = torch.full((512,), 448.0)
    case.arguments["cos_sin_cache"] = torch.cat([torch.zeros(128, 32), torch.ones(128, 32)], 1)
    case.arguments["eps"] = 0.0
    return case


def check_by_hand(case: Case) -> None:
    """The scale of 448 is 1, exactly."""
    values, _, scales = place_of(case.pages, int(case.arguments["slots"][127]))
    assert case.pages.bytes[values].eq(0x7E).all()
    assert case.pages.bytes[scales].tolist() == [127] * 7 + [0]
    read = case.pages.read(int(case.arguments["slots"][127]))
    assert read[448::2].eq(-448).all() and read[449::2].eq(448).all()


def test_by_hand():
    case = case_by_hand()
    compress_to_cache(**case.arguments)
    check_by_hand(case)


def case_with_nan() -> Case:
    """Position 5, of the older half of the window that ends at 11."""
    case = prefill(*C4A, 16)
    block = case.arguments["block_table"][0, 1]
    case.arguments["state_cache"][block, 1, 5] = math.nan
    return case


def check_nan(case: Case) -> None:
    """The whole entry of one window is NaN, and no other."""
    for token in (3, 7, 11, 15):
        found = case.pages.read(int(case.arguments["slots"][token])).isnan()
        assert found.all() if token == 11 else not found.any(), token


def test_nan_stays_with_its_window():
    case = case_with_nan()
    compress_to_cache(**case.arguments)
    check_nan(case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_cache": torch.zeros(2, 4, 2048).half()}, "state_cache: dtype torch.float16"),
        ({"state_cache": torch.zeros(2, 4, 1024)}, r"allowed: \(any, any, 2048\)"),
        ({"state_cache": 3}, "state_cache: expected a tensor, got int"),
        ({"positions": torch.zeros(4, dtype=torch.int32)}, "positions: dtype torch.int32"),
        ({"slots": torch.zeros(8, dtype=torch.int64)[::2]}, r"slots: stride\(0\) is 2"),
        ({"state_slots": torch.zeros(2, 2, dtype=torch.int64)}, r"state_slots: shape \(2, 2\)"),
        ({"token_to_request": torch.zeros(4)}, "token_to_request: dtype torch.float32"),
        ({"block_table": torch.zeros(4, dtype=torch.int32)}, r"block_table: shape \(4,\)"),
        ({"norm_weight": torch.zeros(512).half()}, "norm_weight: dtype torch.float16"),
        ({"norm_weight": torch.zeros(448)}, r"norm_weight: shape \(448,\)"),
        ({"cos_sin_cache": torch.zeros(9, 32)}, r"cos_sin_cache: shape \(9, 32\)"),
        ({"cache": torch.zeros(4, 2, 576, dtype=torch.uint8)}, "cache: shape"),
        ({"compress_ratio": 0}, "compress_ratio: 0, allowed: 1 and more"),
        ({"implementation": "cuda"}, "implementation: 'cuda', allowed: reference, triton"),
        ({"implementation": "triton"}, "device cpu, allowed in the Triton compressor: cuda"),
    ],
)
def test_bad_arguments(change, message):
    case = prefill(*C4A, 4)
    before = case.pages.bytes.clone()
    with pytest.raises(ValueError, match=message):
        compress_to_cache(**case.arguments | change)
    assert torch.equal(case.pages.bytes, before)
