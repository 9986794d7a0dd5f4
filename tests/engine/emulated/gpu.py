"""A GPU of capability 12.0 that vLLM and PyTorch believe in, with nothing behind it.

Streams and events do nothing, as everything runs in order. Memory is the CPU's.
"""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tests.engine.emulated import graphs, rowwise

CAPABILITY = (12, 0)
MOST_GPUS = 8
PROPERTIES = SimpleNamespace(
    name="emulated",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    # An RTX PRO 6000's.
    multi_processor_count=188,
    total_memory=96 << 30,
    gcnArchName="",
)


class Event:
    """Has always happened."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Mark a place in a stream."""

    def wait(self, stream: Any = None) -> None:
        """Let a stream wait."""

    def synchronize(self) -> None:
        """Let the CPU wait."""

    def query(self) -> bool:
        """Whether it has happened."""
        return True


class Stream:
    """What it is given to do is done at once."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        """Wait for another stream."""

    def wait_event(self, event: Any) -> None:
        """Wait for an event."""

    def synchronize(self) -> None:
        """Let the CPU wait."""


def installed() -> bool:
    """Whether it is in place."""
    return torch.cuda.Event is Event


def install() -> None:
    """Put it in place. Once, in a process of its own, before anything of vLLM is imported.

    Raises:
        RuntimeError: vLLM is imported already.
    """
    if "vllm" in sys.modules:
        raise RuntimeError("vLLM is imported here, and knows what GPU there is")
    _install_in_torch()
    from tests.checkpoint.loading import check_loading

    check_loading.fake_platform(CAPABILITY)
    # What `fake_platform` has instead of these is never called.
    torch.cuda.Event = torch.Event = Event
    torch.cuda.Stream = torch.Stream = Stream
    _install_in_vllm()
    from tests.engine.emulated import compiled_ops

    compiled_ops.install()
    rowwise.install()


def _install_in_torch() -> None:
    stream = Stream()
    torch.accelerator.synchronize = torch.cuda.synchronize = lambda *device: None
    torch.accelerator.empty_cache = lambda: None
    torch.cuda.set_stream = lambda stream: None
    torch.cuda.current_stream = lambda *device: stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.get_device_capability = lambda *device: CAPABILITY
    torch.cuda.get_device_properties = lambda *device: PROPERTIES
    torch.cuda.mem_get_info = lambda *device: (PROPERTIES.total_memory, PROPERTIES.total_memory)
    torch.cuda.CUDAGraph, torch.cuda.graph = graphs.CUDAGraph, graphs.capture
    torch.Tensor.pin_memory = lambda tensor, *device: tensor
    torch.Tensor.record_stream = lambda tensor, stream: None
    # PyTorch has products of another type than their operands for CUDA alone.
    _library.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")


_library = torch.library.Library("aten", "IMPL")


def _install_in_vllm() -> None:
    from vllm.platforms import Platform, current_platform

    platform = type(current_platform)
    # vLLM's own operations are registered for the tensors that they get.
    platform.dispatch_key = "CPU"
    platform.is_pin_memory_available = classmethod(lambda cls: False)
    platform.get_current_memory_usage = classmethod(lambda cls, device=None: 0.0)
    # Of what is given to torch.compile the graphs are made, and nothing below them.
    platform.simple_compile_backend = "eager"
    platform.device_count = classmethod(lambda cls: MOST_GPUS)
    # Of ranks, over gloo.
    platform.get_device_communicator_cls = Platform.get_device_communicator_cls
    platform.graph_pool_handle = classmethod(lambda cls: 0)
    from vllm_sm12x.adapters import warm_up

    applies = warm_up._applies

    def with_a_gpu(worker: Any) -> bool:
        with patch.object(torch.cuda, "is_available", lambda: True):
            return applies(worker)

    warm_up._applies = with_a_gpu
