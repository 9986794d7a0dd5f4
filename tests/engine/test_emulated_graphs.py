"""Emulated CUDA graphs: a replay does what was recorded, with the memory of the capture."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.engine.emulated.graphs import CaptureError, CUDAGraph, capture, record


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def captured(function, *arguments):
    """The graph of a call, and what the call gave."""
    graph = CUDAGraph()
    with capture(graph):
        result = function(*arguments)
    return graph, result


def test_a_replay_reads_what_lies_in_the_inputs_memory():
    x, y = torch.randn(4, 6), torch.randn(6, 3)
    graph, result = captured(lambda: (x @ y).relu().sum(0))
    place = result.data_ptr()
    x.copy_(torch.randn(4, 6))
    assert not torch.equal(result, (x @ y).relu().sum(0))
    graph.replay()
    assert torch.equal(result, (x @ y).relu().sum(0))
    assert result.data_ptr() == place


def test_views_copies_and_writes():
    x, out = torch.randn(4, 6), torch.zeros(24)

    def step():
        # The first reshape is another name for the same memory, the second has to copy.
        rows = x.reshape(6, 4)[1:]
        turned = x.t().reshape(-1)
        out[:20] = rows.reshape(-1)
        out.add_(turned)
        return out[::2] * torch.full((12,), 3.0)

    graph, result = captured(step)
    x.copy_(torch.randn(4, 6))
    out.zero_()
    graph.replay()
    expected = torch.zeros(24)
    expected[:20] = x.flatten()[4:]
    expected += x.t().flatten()
    assert torch.equal(out, expected)
    assert torch.equal(result, expected[::2] * 3)


def test_what_python_decided_is_fixed():
    x, rows = torch.arange(8.0), 4
    graph, result = captured(lambda: x[:rows] * rows)
    rows = 2
    graph.replay()
    assert result.tolist() == [0, 4, 8, 12]


def test_memory_without_numbers_gets_none():
    """As where a graph reads what nothing in it has written."""
    graph, result = captured(lambda: torch.empty(3))
    result.fill_(7.0)
    graph.replay()
    assert result.tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
    ],
)
def test_to_look_at_a_number_is_an_error(look):
    x = torch.randn(5)
    with pytest.raises(CaptureError, match="while a graph is captured"):
        captured(look, x)
    # Afterwards it is none.
    look(x)
    assert capture.current is None
    # Nor is it where positions choose.
    captured(lambda: x[torch.tensor([1, 2])])


_library = torch.library.Library("tested_graphs", "FRAGMENT")
_library.define("twice(Tensor x) -> Tensor")
calls = []


def _twice(x):
    calls.append(len(x))
    return x * 2


_library.impl("twice", _twice, "CPU")


def test_an_operation_of_vllms_is_recorded_by_what_it_does():
    x = torch.randn(3)
    graph, result = captured(lambda: torch.ops.tested_graphs.twice(x) + 1)
    before = len(calls)
    x.add_(1)
    graph.replay()
    assert len(calls) == before
    assert torch.equal(result, x * 2 + 1)


def test_a_call_that_is_seen_as_a_whole_may_look():
    x = torch.tensor([3.0, 1.0, 2.0])
    graph, result = captured(lambda: record(lambda: torch.tensor(sorted(x.tolist()))) * 10)
    x.copy_(torch.tensor([5.0, 9.0, 7.0]))
    graph.replay()
    assert result.tolist() == [50, 70, 90]


@triton.jit
def add_kernel(x, y, out, amount, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) + tl.load(y + at) * amount)


def test_launches():
    from emulator.driver import emulated

    x, y = torch.randn(64), torch.randn(64)
    with emulated((12, 0), 101_376) as driver:
        driver.perform = record

        def step():
            out = torch.empty(64)
            add_kernel[(1,)](x, y, out, 3, BLOCK=64)
            return out + 1

        graph, result = captured(step)
        x.copy_(torch.randn(64))
        graph.replay()
        assert torch.allclose(result, x + 3 * y + 1, atol=1e-5)
        assert [one.kernel for one in driver.launched] == ["add_kernel"] * 2
