"""The Triton compressors of the patched release at a request's first windows, lane by lane.

A window that overlaps begins four positions before the first token there.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from vllm.models.deepseek_v4.common.ops import fused_compress_quant_cache

# Bytes of a page: two entries, then their scales.
PAGE = 2048
LAYOUTS = {
    # Head, group of values that share a scale, bytes of an entry, bytes of its scales.
    "keys": (512, 64, 576, 8),
    "indexer": (128, 128, 128, 4),
    "indexer, MXFP4": (128, 32, 64, 4),
}


@triton.jit
def pack_nothing(low, high):
    """In place of inline assembly, which the interpreter does not know."""
    return (low * 0 + high * 0).to(tl.uint8)


@pytest.fixture(autouse=True)
def no_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_compress_quant_cache, "_fp32x2_to_fp4x2", pack_nothing)


def run(layout: str, ratio: int, tokens: int) -> dict[str, torch.Tensor]:
    """The first ``tokens`` of a request, each with a state; nothing else is in the state cache."""
    head, quant_block, token_stride, scale_dim = LAYOUTS[layout]
    overlap = ratio == 4
    width = head * (1 + overlap)
    generator = torch.Generator().manual_seed(ratio)
    block_size = 4
    blocks = -(-tokens // block_size)
    given = {
        "state_cache": torch.randn(blocks, block_size, 2 * width, generator=generator),
        "token_to_req_indices": torch.zeros(tokens, dtype=torch.int32),
        "positions": torch.arange(tokens),
        "slot_mapping": torch.arange(tokens),
        "block_table": torch.randperm(blocks, generator=generator).int()[None],
        "rms_norm_weight": torch.ones(head),
        "cos_sin_cache": torch.cat([torch.ones(tokens, 32), torch.zeros(tokens, 32)], 1),
        "kv_cache": torch.full((tokens // 2 + 1, PAGE), 0xFF, dtype=torch.uint8),
        "slots": torch.arange(tokens),
    }
    names = [name for name in given if name not in ("slots", "kv_cache")]
    fused_compress_quant_cache.compress_norm_rope_store_triton(
        **{name: given[name] for name in names},
        num_actual=tokens,
        block_size=block_size,
        state_width=width,
        # Two entries a page.
        kv_cache=given["kv_cache"].view(-1, 2, PAGE // 2),
        k_cache_metadata=SimpleNamespace(slot_mapping=given["slots"]),
        pdl_kwargs={},
        head_dim=head,
        rope_head_dim=64,
        compress_ratio=ratio,
        overlap=overlap,
        use_fp4_cache="MXFP4" in layout,
        rms_norm_eps=0.0,
        quant_block=quant_block,
        token_stride=token_stride,
        scale_dim=scale_dim,
    )
    return given


def expected_entry(given: dict[str, torch.Tensor], head: int, ratio: int, position: int):
    """float64 ``[head]``: the definition; the angles are zero and the norm's weights one."""
    width = given["state_cache"].shape[2] // 2
    window = ratio * 2 if ratio == 4 else ratio
    states = given["state_cache"][given["block_table"][0].long()].flatten(0, 1).double()
    vectors, scores = [], []
    for row in range(window):
        at = position - window + 1 + row
        if at >= 0:
            first = head if row >= ratio else 0
            vectors.append(states[at, first : first + head])
            scores.append(states[at, width + first : width + first + head])
    share = torch.stack(scores).softmax(0)
    entry = (share * torch.stack(vectors)).sum(0)
    return entry / entry.square().mean().sqrt()


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_addresses(layout, ratio, addresses):
    given = run(layout, ratio, 2 * ratio)
    spans = [
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
        for tensor in given.values()
    ]
    assert len(addresses) > 10
    for number, formed in enumerate(addresses):
        inside = np.zeros(formed.shape, dtype=bool)
        for first, end in spans:
            inside |= (formed >= first) & (formed < end)
        assert inside.all(), f"access {number}: {(~inside).sum()} of {inside.size} are outside"


@pytest.mark.parametrize("layout", ["keys", "indexer"])
def test_the_first_windows_are_the_definitions(layout):
    head, _, token_stride, _ = LAYOUTS[layout]
    given = run(layout, 4, 12)
    nope = 448 if layout == "keys" else 128
    for position in range(12):
        page, offset = divmod(position, 2)
        stored = given["kv_cache"][page, offset * token_stride :][:token_stride]
        if position % 4 != 3:
            assert stored.eq(0xFF).all()
            continue
        expected = expected_entry(given, head, 4, position)
        if layout == "keys":
            scales = given["kv_cache"][page, 2 * token_stride + offset * 8 :][:7].double()
            scale = (scales - 127).exp2().repeat_interleave(64)
            rotary = stored[nope:].view(torch.bfloat16).double()
            torch.testing.assert_close(rotary, expected[nope:], rtol=2**-7, atol=1e-5)
        else:
            place = given["kv_cache"][page, 2 * token_stride + offset * 4 :][:4]
            scale = place.view(torch.float32).double()
        found = stored[:nope].view(torch.float8_e4m3fn).double() * scale
        # e4m3 has four bits, and the interpreter rounds to it and to bfloat16 by cutting, and may
        # lose a carry: half of a number then. The mean shows whether the window is right.
        error = (found - expected[:nope]).abs()
        assert error.median() < 0.06
        assert math.isfinite(error.max()) and (error > 0.3).float().mean() < 0.05
