"""The decode kernels: tables, and real shapes on a GPU. Small ones are in ``emulated/``."""

from __future__ import annotations

import math

import pytest
import torch
from capture import copy_of, replay_on_gpu
from decode_checks import FullDecode, check_tokens

from vllm_sm12x.ops import sparse_mla
from vllm_sm12x.ops.sparse_mla import config_decode

SCALE = 512**-0.5
TARGETS = ("sm_120", "sm_121", "sm_90")
# Multiprocessors of an RTX PRO 6000, an RTX 5090, a GB10 and an H200.
FILL = [("sm_120", 188), ("sm_120", 170), ("sm_121", 48), ("sm_90", 132)]
# Width and block size of the compressed cache: none, C4A, C128A at 16K, 128K and 1M tokens.
EXTRAS = {"window": None, "C4A": (512, 64), "16K": (128, 2), "128K": (1024, 2), "1M": (8192, 2)}


def test_every_shape_has_a_row():
    assert set(config_decode.TABLE) == {*TARGETS, "triton"}
    for target in config_decode.TABLE:
        for heads in (8, 16, 32, 64, 128):
            for keys in (128, 640, 256, 1152, 8320):
                for tokens in (1, 12, 96, 512):
                    row = config_decode.row(tokens, heads, keys, target)
                    # A block has 16 rows of a matrix instruction, and no more heads than wanted.
                    assert row.block_h == 16 or heads % row.block_h == 0
                    assert target != "triton" or row.parts == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 24, 128, "sm_120"), "q: 24 heads, allowed .*: 8, 16, 32, 64, 128"),
        ((1, 64, 128, "sm_80"), "target: 'sm_80', allowed: sm_120, sm_121, sm_90, triton"),
        ((65_536, 64, 128, "sm_90"), "q: 65536 tokens, allowed .*: up to 65535"),
        ((1, 64, 16_385, "sm_121"), "swa_indices, extra_indices: 16385 keys, allowed .* 16384"),
    ],
)
def test_a_shape_without_a_row_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        config_decode.row(*arguments)
    *shape, target = arguments
    with pytest.raises(ValueError, match=message):
        sparse_mla.decode_scratch_bytes(*shape, implementation="triton", target=target)


@pytest.mark.parametrize(("target", "fill"), FILL)
@pytest.mark.parametrize("keys", [0, 1, 128, 640, 8320])
def test_the_number_of_splits(target, fill, keys):
    """One request fills the GPU where it has tiles enough; a full batch is not split."""
    for heads in (8, 64, 128):
        for tokens in (1, 3, 40, 512):
            row = config_decode.row(tokens, heads, keys, target)
            splits = config_decode.splits(row, tokens, heads, keys, fill)
            programs = tokens * -(-heads // row.block_h)
            tiles = -(-keys // row.block_n)
            assert 1 <= splits <= max(1, min(tiles, 64))
            if splits > 1:
                assert splits * programs <= fill * row.programs
            if splits < min(tiles, 64):
                assert (splits + 1) * programs > fill * row.programs
            if splits > 1:
                combine = config_decode.combine_row(splits)
                assert splits <= combine.split_slots < 2 * splits
                assert 512 % combine.block_d == 0


@pytest.mark.parametrize(("target", "fill"), FILL)
@pytest.mark.parametrize("heads", [8, 64])
def test_scratch_covers_every_smaller_batch(target, fill, heads):
    def stated(tokens):
        return sparse_mla.decode_scratch_bytes(
            tokens, heads, 1152, implementation="triton", target=target, multiprocessors=fill
        )

    largest = 0
    for tokens in (1, 2, 3, 7, 16, 17, 64, 512):
        row = config_decode.row(tokens, heads, 1152, target)
        splits = config_decode.splits(row, tokens, heads, 1152, fill)
        if splits > 1:
            largest = max(largest, tokens * heads * splits * (512 + 2) * 4)
        assert stated(tokens) >= largest > 0
    # It does not grow with the batch: at most one partial result a program that fits, in blocks.
    row = config_decode.row(1, heads, 1152, target)
    assert stated(512) <= fill * row.programs * 64 * 514 * 4


def small_call(**changes) -> dict:
    arguments = FullDecode(2, 8, None).arguments()
    return {**arguments, **changes}


def test_an_unknown_implementation_is_refused():
    message = "implementation: 'cuda', allowed: .*reference.*triton"
    with pytest.raises(ValueError, match=message):
        sparse_mla.sparse_mla_decode(**small_call(implementation="cuda"))


def test_a_block_size_that_is_no_power_of_two_is_refused():
    cache = torch.zeros(2, 3, 584, dtype=torch.uint8)
    with pytest.raises(ValueError, match="swa_cache: block size 3, allowed: a power of two"):
        sparse_mla.sparse_mla_decode(**small_call(swa_cache=cache, implementation="triton"))


def test_heads_without_a_kernel_are_refused():
    case = FullDecode(1, 3, None)
    with pytest.raises(ValueError, match="q: 3 heads, allowed in the Triton decode kernel: 8, 16"):
        sparse_mla.sparse_mla_decode(**case.arguments(), implementation="triton")


def test_the_reference_is_the_default():
    case = FullDecode(3, 8, (512, 64))
    sparse_mla.sparse_mla_decode(**case.arguments())
    expected = case.out.clone()
    case.out.fill_(math.nan)
    sparse_mla.sparse_mla_decode(**case.arguments(), implementation="reference")
    assert torch.equal(case.out, expected)
    check_tokens(case.q, case.keys(), case.sink, SCALE, case.out, case.lse)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("tokens", [1, 3, 12, 40])
def test_real_shapes_on_a_gpu(lowered, tokens, extra, heads):
    case = FullDecode(tokens, heads, EXTRAS[extra], seed=tokens)
    given = {name: copy_of(value, "cuda") for name, value in case.arguments().items()}
    sparse_mla.sparse_mla_decode(**given, implementation="triton")
    some = sorted({0, 1 % tokens, 2 % tokens, tokens - 1})
    keys = case.keys()
    check_tokens(
        case.q[some],
        [keys[t] for t in some],
        case.sink,
        SCALE,
        given["out"].cpu()[some],
        given["lse"].cpu()[some],
    )
    assert given["out"].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("extra", ["window", "C4A", "128K"])
@pytest.mark.parametrize("tokens", [1, 12, 300])
def test_a_captured_graph_follows_its_inputs(tokens, extra):
    def call(**arguments):
        sparse_mla.sparse_mla_decode(**arguments, implementation="triton")

    first, second = (FullDecode(tokens, 32, EXTRAS[extra], seed=seed) for seed in (1, 2))
    _, after = replay_on_gpu(call, first.arguments(), second.arguments())
    some = sorted({0, 2 % tokens, tokens - 1})
    keys = second.keys()
    check_tokens(
        second.q[some],
        [keys[t] for t in some],
        second.sink,
        SCALE,
        after["out"][some],
        after["lse"][some],
    )


@pytest.mark.gpu
def test_the_kernel_stays_in_the_stated_scratch():
    row_tokens = 3
    case = FullDecode(row_tokens, 64, EXTRAS["128K"])
    given = {name: copy_of(value, "cuda") for name, value in case.arguments().items()}
    sparse_mla.sparse_mla_decode(**given, implementation="triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sparse_mla.sparse_mla_decode(**given, implementation="triton")
    taken = torch.cuda.max_memory_allocated() - before
    stated = sparse_mla.decode_scratch_bytes(row_tokens, 64, 1152)
    assert 0 < taken <= stated + 512  # torch rounds an allocation up
