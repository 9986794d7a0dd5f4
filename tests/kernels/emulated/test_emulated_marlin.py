"""Our MXFP4 experts beside vLLM's Marlin, on identical inputs: both as they run on SM12x."""

from __future__ import annotations

import sys
from pathlib import Path

import marlin
import pytest
import torch
from marlin import marlin_experts
from mxfp4_float8 import relative_error
from native_kernels import EmulatedStream
from test_mxfp4_experts import definition, draw

from vllm_sm12x.ops.mxfp4_experts import mxfp4_experts

sys.path.insert(0, str(Path(__file__).parents[3]))  # benchmarks
from benchmarks.mxfp4_experts import marlin as benchmarked

# A number of tokens for which vLLM lets so many pairs stand together, of as many experts as slots.
TOKENS = {8: 5, 16: 13, 32: 27, 48: 42, 64: 61}

# Marlin rounds to bfloat16: gate and up, the activation, each expert's result, and the sum.
ROUNDINGS = 4
BFLOAT16 = 2.0**-8


def both(arguments, *, limit=None, on_input=False, tile=None):
    """Marlin's result and ours."""
    theirs, ours = ([*arguments[:7], torch.full_like(arguments[7], float("nan"))] for _ in range(2))
    stream = EmulatedStream()
    marlin_experts(*theirs, stream=stream, limit=limit, on_input=on_input, tile=tile)
    mxfp4_experts(
        *ours,
        swiglu_limit=limit,
        apply_router_weight_on_input=on_input,
        implementation="triton",
    )
    return theirs[7], ours[7], stream


def check(arguments, **options):
    theirs, ours, stream = both(arguments, **options)
    options.pop("tile", None)
    expected, magnitude = definition(*arguments[:7], **options)
    assert ((theirs.double() - expected).abs() <= ROUNDINGS * BFLOAT16 * magnitude).all()
    assert ((theirs.double() - ours.double()).abs() <= ROUNDINGS * BFLOAT16 * magnitude).all()
    # We round less often.
    assert relative_error(ours, expected) <= relative_error(theirs, expected)
    return stream


@pytest.mark.parametrize(
    ("block", "tile"),
    [(block, tile) for block in TOKENS for tile in marlin.tiles_for(block)],
    ids=str,
)
def test_each_of_marlins_kernels(block, tile):
    given = draw(TOKENS[block], experts=2, hidden=256, intermediate=256, top_k=2, seed=block)
    stream = check(given, limit=2.0, tile=tile)
    (threads, rows, width, depth) = (tile[2], -(-block // 16), tile[1] // 16, tile[0] // 16)
    ran = {launched.kernel for launched in stream.launched if "repack" not in launched.kernel}
    assert len(ran) == 1
    assert f"ELi{threads}ELi{rows}ELi{width}ELi{depth}ELb{int(block == 8)}E" in ran.pop()


def test_the_benchmarks_number_of_e2m1_is_vllms():
    from vllm.scalar_type import scalar_types

    assert scalar_types.float4_e2m1f.id == benchmarked._E2M1
