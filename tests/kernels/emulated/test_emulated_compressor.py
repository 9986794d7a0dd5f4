"""The Triton compressor against the definition and vLLM's own, both as compiled for SM12x."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from compressor_checks import Case, check, compare, place_of, prefill, run_vllms, signed
from test_compressor import C4A, C128A, case_by_hand, case_with_nan, check_by_hand, check_nan

from vllm_sm12x.ops.compressor import compress_to_cache, kernel
from vllm_sm12x.ops.compressor.config import TABLE, Row


def run(case: Case, row: Row | None = None) -> None:
    if row is None:
        compress_to_cache(**case.arguments, implementation="triton")
    else:
        kernel.compress_to_cache(**case.arguments, row=row)


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("page_size", [2, 64])
def test_a_prefill_of_overlapping_windows(page_size, spread):
    case = prefill(*C4A, 43, page_size=page_size, spread=spread, unslotted=(11,), padded=(19,))
    run(case)
    check(case)


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_a_prefill_of_long_windows(spread):
    case = prefill(*C128A, 384, block_size=8, spread=spread)
    run(case)
    check(case)


def test_a_decode_batch():
    case = Case(*C4A, positions=[3, 4, 11, 6, 19, 23], requests=[2, 0, 1, 5, 3, 4], padded=(4,))
    run(case)
    check(case)


def test_a_decode_batch_of_long_windows():
    case = Case(*C128A, positions=[127, 511, 200, 255], requests=[1, 0, 2, 3], block_size=8)
    assert case.counting() == [0, 1, 3]
    run(case)
    check(case)


# With the last two, a whole step, or a group of a window, can be before the first token.
ROWS = [*TABLE["sm_120"].values(), Row(4, 2), Row(2, 4), Row(2, 1), Row(1, 8)]


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("shape", [C4A, C128A], ids=["C4A", "C128A"])
def test_every_row_and_others(shape, row):
    ratio, overlap = shape
    window = ratio * (2 if overlap else 1)
    if row.step * row.groups > window:
        row = Row(window // row.groups, row.groups)
    case = prefill(*shape, 128, block_size=8, seed=5)
    run(case, row)
    check(case)


def test_scores_that_rise_and_fall_through_the_window():
    """The largest score comes first, last or in between; some tokens weigh nothing at all."""
    for seed, slope in enumerate((-40.0, 40.0, 0.0)):
        case = prefill(*C128A, 128, block_size=8, seed=seed, spread=1.0)
        states, table = case.arguments["state_cache"], case.arguments["block_table"][0]
        for position in range(128):
            scores = states[table[position // 8], position % 8, 512:]
            scores += slope * position
            if position % 3 == 0:
                scores.fill_(-torch.inf)
        states[table[0], 1, 512:] = 100.0 if slope == 0 else states[table[0], 1, 512:]
        run(case)
        check(case)


@pytest.mark.parametrize("name", ["token_to_request", "positions", "state_slots", "slots"])
def test_tokens_beyond_the_shortest_array_are_left_out(name):
    case = prefill(*C4A, 16)
    case.arguments[name] = case.arguments[name][:12]
    run(case)
    case.unslotted = (15,)
    check(case)


def test_nothing_to_do_writes_nothing():
    case = prefill(*C4A, 3)
    run(case)
    for name in ("token_to_request", "positions", "state_slots", "slots"):
        case.arguments[name] = case.arguments[name][:0]
    run(case)
    assert case.pages.bytes.eq(0xFF).all()


@pytest.mark.parametrize("magnitude", [0.0, 2.0**-120, 1e-7, 1e4, 2.0**100])
def test_weights_of_any_magnitude(magnitude):
    """Scales at both ends: 1e-4 is the least largest value, and none is above float32's."""
    case = prefill(*C4A, 8)
    case.arguments["norm_weight"] = case.arguments["norm_weight"].float() * magnitude
    run(case)
    expected = prefill(*C4A, 8)
    expected.arguments["norm_weight"] = case.arguments["norm_weight"]
    compress_to_cache(**expected.arguments, implementation="reference")
    for token in case.counting():
        slot = int(case.arguments["slots"][token])
        values, rotated, scales = place_of(case.pages, slot)
        ours, theirs = case.pages.bytes, expected.pages.bytes
        assert torch.equal(ours[scales], theirs[scales])
        assert (signed(ours[values]) - signed(theirs[values])).abs().max() <= 1
        assert (signed(ours[values]) == signed(theirs[values])).float().mean() > 0.99
        ours, theirs = (part[rotated].view(torch.bfloat16).float() for part in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=magnitude * 1e-5)


def test_float32_weights():
    case = prefill(*C4A, 12)
    case.arguments["norm_weight"] = case.arguments["norm_weight"].float()
    run(case)
    check(case)


def test_by_hand():
    case = case_by_hand()
    run(case)
    check_by_hand(case)


def test_nan_stays_with_its_window():
    case = case_with_nan()
    run(case)
    check_nan(case)


def test_a_window_without_a_row_is_an_error():
    case = Case(16, False, positions=[15], requests=[0])
    with pytest.raises(ValueError, match="a window of 16 tokens, allowed in the Triton compressor"):
        run(case)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
@pytest.mark.parametrize("shape", [C4A, C128A], ids=["C4A", "C128A"])
def test_the_cache_that_vllms_kernel_leaves(shape):
    ratio, overlap = shape
    requests = [0] * ratio * 2 + [1] * ratio
    positions = [*range(ratio * 2), *range(ratio)]
    ours, theirs = (
        Case(*shape, positions, requests, block_size=8, padded=(2 * ratio - 1,)) for _ in range(2)
    )
    run(ours)
    run_vllms(theirs)
    assert len(ours.counting()) == 2
    check(theirs)
    compare(ours, theirs)
