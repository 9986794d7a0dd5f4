"""The watcher sees what a capture would refuse, and counts memory."""

from __future__ import annotations

import pytest
import torch
from capture import record


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
