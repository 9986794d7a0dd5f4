"""``_compute_prefill_metadata_kernel`` of the patched release, lane by lane."""

from __future__ import annotations

import pytest
import torch
import triton
from vllm.v1.attention.backends.mla import sparse_swa

WINDOW = 128


def batch(prefills: int, decodes: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Lengths and query starts of a batch, decodes first, and the lengths to gather."""
    generator = torch.Generator().manual_seed(100 * prefills + decodes)
    query_lens = [1] * decodes + torch.randint(2, 400, (prefills,), generator=generator).tolist()
    prefixes = torch.randint(0, 2 * WINDOW, (decodes + prefills,), generator=generator).tolist()
    prefixes[-1] = 0  # a fresh prompt
    seq_lens = [query + prefix for query, prefix in zip(query_lens, prefixes, strict=True)]
    starts = [0]
    for query in query_lens:
        starts.append(starts[-1] + query)
    gather = [
        # The chunk itself, and what of the window before it is still cached.
        query + min(prefix, WINDOW - 1)
        for query, prefix in zip(query_lens[decodes:], prefixes[decodes:], strict=True)
    ]
    return (
        torch.tensor(seq_lens, dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        gather,
    )


def span(tensor: torch.Tensor) -> tuple[int, int]:
    first = tensor.data_ptr()
    return first, first + (tensor.numel() - 1) * tensor.element_size()


@pytest.mark.parametrize("decodes", [0, 3])
@pytest.mark.parametrize("prefills", [1, 2, 3, 4, 5, 7, 9])
def test_results_and_addresses(prefills, decodes, addresses):
    seq_lens, starts, expected = batch(prefills, decodes)
    out = torch.full((prefills,), -1, dtype=torch.int32)
    sparse_swa._compute_prefill_metadata_kernel[(1,)](
        out,
        seq_lens,
        starts,
        prefills,
        decodes,
        WINDOW,
        BLOCK_SIZE=triton.next_power_of_2(prefills),
    )
    assert out.tolist() == expected
    *loads, store = addresses
    assert len(loads) == 3
    lanes = triton.next_power_of_2(prefills)
    for load, tensor in zip(loads, (seq_lens, starts, starts), strict=True):
        first, last = span(tensor)
        assert load.size == lanes
        assert load.min() >= first
        assert load.max() <= last, "a lane forms an address past the tensor's end"
    # The live lanes of the store; its masked-off lanes write nothing.
    first, last = span(out)
    assert store[:prefills].min() == first
    assert store[:prefills].max() == last


def test_the_builder_returns_the_same(addresses):
    seq_lens, starts, expected = batch(5, 2)
    builder = object.__new__(sparse_swa.DeepseekSparseSWAMetadataBuilder)
    builder.window_size = WINDOW
    fields = builder._build_deepseek_v4_metadata(2, 5, seq_lens, starts)
    assert fields["prefill_gather_lens"].tolist() == expected
    assert fields["prefill_seq_lens"].tolist() == seq_lens[2:].tolist()
    assert builder._build_deepseek_v4_metadata(7, 0, seq_lens, starts) == {}
