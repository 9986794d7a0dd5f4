"""Compiling what would be launched."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from vllm_sm12x.ops.launching import (
    capability_of,
    compile_only,
    one_of_each,
    stand_in,
)


@triton.jit
def add_one(x, n):
    tl.store(x, tl.load(x) + n)


def test_inside_compile_only_a_launch_compiles(monkeypatch):
    """Also where one is inside another."""
    told = []
    monkeypatch.setattr(
        JITFunction,
        "run",
        lambda kernel, *arguments, grid, warmup, **options: told.append(
            (kernel, arguments, grid, warmup, options)
        ),
    )
    run = JITFunction.run
    with compile_only((12, 0)) as outer:
        with compile_only((12, 1)) as inner:
            add_one[(3,)]("x", 5, num_warps=2)
        add_one[(4,)]("y", 6)
    add_one[(5,)]("z", 7)
    assert told == [
        (add_one, ("x", 5), (3,), True, {"num_warps": 2}),
        (add_one, ("y", 6), (4,), True, {}),
        (add_one, ("z", 7), (5,), False, {}),
    ]
    assert (len(inner.kernels), len(outer.kernels)) == (1, 1)
    assert JITFunction.run is run


def test_an_error_inside_ends_it():
    run = JITFunction.run
    with pytest.raises(KeyError), compile_only((12, 0)):
        raise KeyError
    assert JITFunction.run is run


def test_another_thread_still_launches(monkeypatch):
    import threading

    told = []
    monkeypatch.setattr(
        JITFunction, "run", lambda kernel, *arguments, grid, warmup: told.append(warmup)
    )
    with compile_only((12, 0)) as compilation:
        thread = threading.Thread(target=lambda: add_one[(1,)]("x", 5))
        thread.start()
        thread.join()
    assert (told, compilation.kernels) == ([False], [])


def test_the_capability(monkeypatch):
    on_gpu = SimpleNamespace(is_cuda=True, device="cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", Mock(return_value=(9, 0)))
    assert capability_of("x", on_gpu, "kernel") == (9, 0)
    torch.cuda.get_device_capability.assert_called_once_with("cuda:1")
    x = torch.empty(1, device="meta")
    with compile_only((12, 1)):
        assert capability_of("x", x, "kernel") == (12, 1)
    with pytest.raises(ValueError, match="^x: device meta, allowed in the Triton kernel: cuda$"):
        capability_of("x", x, "Triton kernel")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_a_stand_in(dtype):
    storage = torch.zeros(4096, dtype=dtype)
    assert storage.data_ptr() % 16 == 0
    for offset in range(17):
        for tensor in (
            storage[offset : offset + 5],
            storage[offset : offset + 600].view(20, 30)[:, 3:9],
            storage.as_strided((3, 4, 5), (7, 0, 100), offset),
            storage[offset:offset],
        ):
            copy = stand_in(tensor)
            assert copy.device.type == "meta"
            assert copy.dtype == dtype
            assert (copy.shape, copy.stride()) == (tensor.shape, tensor.stride())
            if tensor.numel():
                assert copy.data_ptr() % 16 == tensor.data_ptr() % 16


def test_one_of_each():
    assert one_of_each(range(1, 40), lambda n: n // 16) == [1, 16, 32]
    assert one_of_each(range(1, 5), lambda n: n % 2) == [1, 2]
    assert one_of_each([], str) == []
