"""Entries come in one order, whatever order the kernel wrote them in."""

from __future__ import annotations

import inspect
import re

import torch

import selection_order


def test_rows_ascend_and_what_is_no_entry_comes_last():
    given = torch.tensor([[5, 0, 3, 9], [7, -1, 2, -1], [-1, -1, -1, -1]], dtype=torch.int32)
    wanted = [[0, 3, 5, 9], [2, 7, -1, -1], [-1, -1, -1, -1]]
    selection_order.in_order(given)
    assert given.tolist() == wanted


def test_a_part_of_a_buffer_is_sorted_where_it_lies():
    buffer = torch.full((4, 6), 8, dtype=torch.int32)
    buffer[1:3, :4] = torch.tensor([[3, 1, 2, 0], [4, -1, 9, 6]], dtype=torch.int32)
    selection_order.in_order(buffer[1:3, :4])
    assert buffer[1:3, :4].tolist() == [[0, 1, 2, 3], [4, 6, 9, -1]]
    assert buffer[0].tolist() == buffer[3].tolist() == [8] * 6
    assert buffer[:, 4:].unique().tolist() == [8]


def test_whatever_the_indexer_calls_gives_them_so(monkeypatch):
    """vLLM's calls, with a kernel that writes them backwards."""
    from vllm import _custom_ops

    def backwards(place):
        def select(*arguments):
            width = arguments[place].size(1)
            arguments[place].copy_(torch.arange(width, 0, -1, dtype=torch.int32))
            return "what it returns"

        return select

    places = {"top_k_per_row_prefill": 3, "top_k_per_row_decode": 3}
    for name, place in places.items():
        monkeypatch.setattr(_custom_ops, name, backwards(place))
    monkeypatch.setattr(torch.ops._C, "persistent_topk", backwards(2), raising=False)
    selection_order.install()
    calls = [(getattr(_custom_ops, name), place) for name, place in places.items()]
    for call, place in [*calls, (torch.ops._C.persistent_topk, 2)]:
        arguments = [None] * place + [torch.zeros(2, 5, dtype=torch.int32), 512]
        assert call(*arguments) == "what it returns"
        assert arguments[place].tolist() == [[1, 2, 3, 4, 5]] * 2


def test_these_are_all_the_calls_that_select():
    """vLLM's indexer has no other call of a top-k kernel with the portable operations."""
    from vllm.model_executor.layers import sparse_attn_indexer

    source = inspect.getsource(sparse_attn_indexer.sparse_attn_indexer)
    found = set(re.findall(r"(?:ops|torch\.ops\.\w+)\.(\w*top_?k\w*)\(", source))
    assert found == {"top_k_per_row_prefill", "top_k_per_row_decode", "persistent_topk"}
