"""The watcher sees what a capture would refuse, and counts memory."""

from __future__ import annotations

import pytest
import torch
from capture import copy_of, record, storage_bytes


@pytest.mark.parametrize(
    "unsafe",
    [
        lambda x: x.sum().item(),
        lambda x: int(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.masked_fill(torch.tensor([True] * 8), 0),
        lambda x: x.__setitem__(x > 0, torch.zeros(8)),
        lambda x: 1 if x.any() else 0,
        lambda x: torch.arange(8).repeat_interleave(x.int().clamp(0, 2)),
    ],
)
def test_unsafe_is_refused(unsafe):
    with pytest.raises(AssertionError, match="not safe"):
        record(unsafe, torch.ones(8))


def test_an_integer_index_is_allowed():
    recorder = record(lambda x, i: x[i], torch.ones(8), torch.tensor([1, 2]))
    assert ("aten::index", ((2,),)) in recorder.calls


def test_memory_is_counted_while_it_is_held():
    def call(x: torch.Tensor) -> None:
        for _ in range(3):
            doubled = x * 2
            total = doubled + 1
            del doubled, total
        x.add_(1)

    assert record(call, torch.zeros(1000)).peak_bytes == 8000


def test_a_result_that_outlives_its_turn_is_counted():
    def call(x: torch.Tensor) -> None:
        for _ in range(3):
            doubled = x * 2  # the last one lives until the new one is there
        del doubled

    assert record(call, torch.zeros(1000)).peak_bytes == 8000


def test_views_and_inputs_are_not_counted():
    recorder = record(lambda x, y: x.view(10, 100).t().add_(y.view(100, 10)), *torch.ones(2, 1000))
    assert recorder.peak_bytes == 0


def test_a_copy_keeps_strides_gaps_and_bytes():
    pages = torch.arange(100, dtype=torch.uint8).as_strided((3, 4, 5), (32, 5, 1), 8)
    copy = copy_of(pages, "cpu")
    assert torch.equal(copy, pages)
    assert copy.stride() == pages.stride() and copy.storage_offset() == 8
    assert torch.equal(storage_bytes(copy), torch.arange(100, dtype=torch.uint8))
    assert copy.data_ptr() != pages.data_ptr()
    assert copy_of(torch.ones(3, dtype=torch.bfloat16), "cpu").dtype == torch.bfloat16
    assert copy_of(0.5, "cpu") == 0.5
