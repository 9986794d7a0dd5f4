"""The Triton compressor: its tables, and real shapes on a GPU. Small ones are in ``emulated/``."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from capture import record, replay_on_gpu
from compressor_checks import Case, check, compare, on_gpu, prefill, run_vllms
from test_compressor import C4A, C128A, case_by_hand, case_with_nan, check_by_hand, check_nan

from vllm_sm12x import lowering
from vllm_sm12x.ops.compressor import compress_to_cache
from vllm_sm12x.ops.compressor.config import TABLE, row

TRITON = dict(implementation="triton")
SHAPES = pytest.mark.parametrize("shape", [C4A, C128A], ids=["C4A", "C128A"])


def test_every_target_has_both_windows():
    assert {target: set(rows) for target, rows in TABLE.items()} == {
        target: {8, 128} for target in ("sm_90", "sm_120", "sm_121")
    }
    for rows in TABLE.values():
        for window, found in rows.items():
            assert window % (found.step * found.groups) == 0
            # Four channels a thread.
            assert found.num_warps * 32 * 4 == 512 * found.groups


def test_a_target_or_a_window_without_a_row_is_an_error():
    with pytest.raises(ValueError, match="target: 'sm_80', allowed: sm_120, sm_121, sm_90"):
        row(8, "sm_80")
    with pytest.raises(ValueError, match="a window of 9 tokens, .*: 8, 128"):
        row(9, "sm_120")


@pytest.fixture(params=["native", "sm120"])
def lowered(request, monkeypatch):
    monkeypatch.setenv(lowering.ENV, request.param)
    lowering.clear_cache()
    yield request.param
    lowering.clear_cache()


def run(case: Case) -> None:
    """On the GPU; the case's cache on the CPU then has the result."""
    given = on_gpu(case)
    compress_to_cache(**given, **TRITON)
    case.take(given["cache"])


@pytest.mark.gpu
@SHAPES
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_a_prefill_on_a_gpu(lowered, shape, spread):
    block_size = 4 if shape == C4A else 8
    case = prefill(*shape, 520, block_size=block_size, spread=spread, padded=(7,), unslotted=(255,))
    run(case)
    check(case)


@pytest.mark.gpu
@SHAPES
def test_a_decode_batch_on_a_gpu(lowered, shape):
    ratio, _ = shape
    positions = [ratio * (token % 3 + 1) - 1 - (token % 4 == 3) for token in range(24)]
    case = Case(*shape, positions=positions, requests=list(range(24)), block_size=8)
    assert len(case.counting()) == 18
    run(case)
    check(case)


@pytest.mark.gpu
def test_by_hand_on_a_gpu(lowered):
    case = case_by_hand()
    run(case)
    check_by_hand(case)


@pytest.mark.gpu
def test_nan_stays_with_its_window_on_a_gpu(lowered):
    case = case_with_nan()
    run(case)
    check_nan(case)


@pytest.mark.gpu
@SHAPES
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_the_cache_that_vllms_kernel_leaves_on_a_gpu(shape):
    ours, theirs = (prefill(*shape, 1024, block_size=8, page_size=64) for _ in range(2))
    run(ours)
    given = on_gpu(theirs)
    theirs.take(run_vllms(theirs, given))
    compare(ours, theirs)


@pytest.mark.gpu
@SHAPES
def test_addresses_beyond_two_to_the_31_on_a_gpu(shape):
    """States and entries at the far end of caches of 9 and of more than 2 GB."""
    case = prefill(*shape, 128, block_size=8)
    given = on_gpu(case)
    states = given["state_cache"]
    far = 2**31 // states[0].numel() + 1
    wide = torch.empty(far + len(states), *states.shape[1:], device="cuda")
    wide[far:] = states
    pages = 2**31 // case.pages.stride + 1
    size = (pages + len(case.pages.cache)) * case.pages.stride
    memory = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
    cache = memory.as_strided(
        (pages + len(case.pages.cache), *case.pages.cache.shape[1:]), case.pages.cache.stride()
    )
    given |= {
        "state_cache": wide,
        "block_table": given["block_table"] + far,
        "cache": cache,
        "slots": torch.where(
            given["slots"] < 0, given["slots"], given["slots"] + pages * case.page_size
        ),
    }
    compress_to_cache(**given, **TRITON)
    case.take(cache[pages:])
    check(case)
    assert memory[: pages * case.pages.stride].eq(0xFF).all()


@pytest.mark.gpu
@SHAPES
def test_the_same_work_whatever_the_values_on_a_gpu(shape):
    traces = []
    for absent in (False, True):
        given = on_gpu(prefill(*shape, 128))
        if absent:
            given["slots"].fill_(-1)
        traces.append(record(compress_to_cache, **given, **TRITON).calls)
    assert traces[0] == traces[1]


@pytest.mark.gpu
@SHAPES
def test_a_captured_graph_follows_its_inputs(shape):
    first, second = (prefill(*shape, 256, block_size=8, seed=seed) for seed in (1, 2))
    _, after = replay_on_gpu(
        lambda **given: compress_to_cache(**given, **TRITON), first.arguments, second.arguments
    )
    second.take(after["cache"])
    check(second)
