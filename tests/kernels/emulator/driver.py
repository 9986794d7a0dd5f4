"""The emulator as a GPU that Triton launches on: ``kernel[grid](...)`` on tensors of the CPU.

Triton compiles as it would for the GPU named, and hands what it compiled to this driver. The PTX
of it runs, with the tensors' own memory as global memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as runtime

from emulator.machine import Counts, Launch, Program, run
from emulator.matrix import WARP
from emulator.memory import GlobalMemory
from emulator.parse import parse

Span = Callable[[torch.Tensor], tuple[int, int]]

# Triton keeps kernels by device, so that each sort of GPU has a number of its own, which no GPU at
# hand has.
_FIRST_DEVICE = 1_000_000
_devices: list[tuple[tuple[int, int], int]] = []

# Pointers to scratch memory of a launch, which stand behind the arguments. None of ours needs any.
_SCRATCH = (0, 0)


@dataclass(frozen=True)
class Launched:
    """A launch that was run: the kernel's name, grid, warps a block and what they executed."""

    kernel: str
    grid: tuple[int, int, int]
    warps: int
    counts: Counts


@dataclass
class EmulatedDriver(DriverBase):
    """Triton's driver of a GPU of this capability that does not exist.

    Attributes:
        capability: Of the GPU.
        shared_limit: Bytes of shared memory that a block may have.
        traffic: Whether to count what accesses to memory take.
        span: First byte, and the one past the last, that a kernel may touch where it gets a tensor.
        launched: What was run, in order.
        perform: What a launch, as a function, is given to. It may call it again later.
    """

    capability: tuple[int, int]
    shared_limit: int
    traffic: bool = False
    span: Span | None = None
    launched: list[Launched] = field(default_factory=list)
    perform: Callable[[Callable[[], None]], None] = lambda launch: launch()

    def __post_init__(self) -> None:
        self._loading: Path | None = None
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": self.shared_limit},
            load_binary=self._load_binary,
        )

    @staticmethod
    def is_active() -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError

    def get_current_device(self) -> int:
        sort = (self.capability, self.shared_limit)
        if sort not in _devices:
            _devices.append(sort)
        return _FIRST_DEVICE + _devices.index(sort)

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, src, metadata):
        """What Triton calls to launch a kernel; Triton keeps it, so that it asks who is active."""
        kinds = list(src.signature.values())

        def launch(x, y, z, stream, ptx, packed, described, entered, left, *arguments):
            runtime.active.launch((x, y, z), ptx, metadata.shared, kinds, arguments)

        return launch

    def launch(self, grid, ptx: Path, shared_bytes: int, kinds, arguments) -> None:
        """Run a kernel on the arguments of a launch, constexprs among them."""
        given = [value for kind, value in _flat(kinds, arguments) if kind != "constexpr"]
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        values = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in given]
        program = _program(ptx)

        def once() -> None:
            counts = run(
                program,
                Launch(grid, (*values, *_SCRATCH), shared_bytes),
                GlobalMemory(map(self.span or span_of, tensors)),
                self.traffic,
            )
            self.launched.append(
                Launched(program.kernel.name, grid, program.kernel.threads // WARP, counts)
            )

        self.perform(once)

    def begin_load(self, module, function, name, files, digest) -> None:
        """Triton's hook before it loads a kernel, which gives the files where the load does not."""
        (self._loading,) = (Path(path) for file, path in files.items() if file.endswith(".ptx"))

    def _load_binary(self, name, binary, shared_bytes, device):
        # Module, kernel, registers, spills, and the most threads that a block may have.
        return None, self._loading, 0, 0, 1024


@functools.cache
def _program(ptx: Path) -> Program:
    """The kernel of a file in Triton's cache, whose names are digests of what made them."""
    return Program(parse(ptx.read_text(encoding="utf-8")))


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor, and the one past its last element; equal where it has none."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in pairs)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def allocation_of(tensor: torch.Tensor) -> tuple[int, int]:
    """As :func:`span_of`, for the memory that the tensor is a part of: kernels of vLLM's also write
    the padding that they allocated behind a tensor."""
    memory = tensor.untyped_storage()
    return memory.data_ptr(), memory.data_ptr() + memory.nbytes()


def _flat(kinds, values) -> Iterator[tuple[str, object]]:
    """Types and values of arguments, those of a tuple one by one."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        else:
            yield kind, value


@contextmanager
def emulated(
    capability: tuple[int, int],
    shared_limit: int,
    traffic: bool = False,
    span: Span | None = None,
) -> Iterator[EmulatedDriver]:
    """Triton launches on the emulator, as a GPU of this capability.

    Args:
        shared_limit: Bytes of shared memory that a block may have.
        traffic: Whether to count what accesses to memory take, which is slow.
        span: What of a tensor's memory a kernel may touch; by default :func:`span_of`.
    """
    driver = EmulatedDriver(capability, shared_limit, traffic, span)
    with ExitStack() as stack:
        stack.enter_context(patch.object(runtime, "_active", driver))
        stack.enter_context(knobs.runtime.scope())
        knobs.runtime.kernel_load_start_hook = driver.begin_load
        yield driver
