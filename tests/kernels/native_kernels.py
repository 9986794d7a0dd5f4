"""Kernels of libraries on the emulated GPU: launches as the library's own host code makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from emulator.driver import Launched, span_of
from emulator.machine import Launch, Program, run
from emulator.matrix import WARP
from emulator.memory import GlobalMemory

from vllm_sm12x.lowering import SHARED_MEMORY_LIMIT

Argument = torch.Tensor | int | float | None


@dataclass
class EmulatedStream:
    """Where kernels are launched, one after another.

    Attributes:
        shared_bytes: Of shared memory that a block is given; by default all that SM12x has.
        traffic: Whether to count what accesses to memory take, which is slow.
        launched: What was run, in order.
    """

    shared_bytes: int = SHARED_MEMORY_LIMIT
    traffic: bool = False
    launched: list[Launched] = field(default_factory=list)

    def launch(
        self,
        program: Program,
        grid: tuple[int, int, int],
        arguments: Sequence[Argument],
        width: int = 0,
    ) -> None:
        """Run a kernel; a tensor stands for its address, None for a null pointer.

        Args:
            width: Threads of a block in x, where not all are.

        What they read of shared memory, and when, is not checked: they load what they do not use.

        Raises:
            KernelFault: The kernel did what a GPU forbids or leaves undefined.
        """
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        values = tuple(
            value.data_ptr() if isinstance(value, torch.Tensor) else value or 0
            for value in arguments
        )
        counts = run(
            program,
            Launch(grid, values, self.shared_bytes, strict=False, width=width),
            GlobalMemory(map(span_of, tensors)),
            self.traffic,
        )
        kernel = program.kernel
        self.launched.append(Launched(kernel.name, grid, kernel.threads // WARP, counts))
