"""Small kernels written in PTX, run on the emulator: for tests of the emulator."""

from __future__ import annotations

import torch
from emulator.driver import span_of
from emulator.machine import Counts, Launch, Program, run
from emulator.memory import GlobalMemory
from emulator.parse import parse

_TEXT = """
.version 8.8
.target sm_120a
.address_size 64
{shared}
.visible .entry tested(
{parameters}
)
.reqntid {threads}
{{
    .reg .pred %p<100>;
    .reg .b16 %rs<100>;
    .reg .b32 %r<100>;
    .reg .b64 %rd<100>;
    mov.u32 %r99, %tid.x;
    cvt.u64.u32 %rd99, %r99;
{loads}
{body}
    ret;
}}
"""


def execute(
    body: str,
    *tensors: torch.Tensor,
    threads: int = 32,
    grid: tuple[int, int, int] = (1, 1, 1),
    shared_bytes: int = 0,
    traffic: bool = False,
    strict: bool = True,
    width: int = 0,
) -> Counts:
    """Run a kernel of one entry.

    Args:
        body: Its instructions. ``%r99`` and ``%rd99`` hold the thread, ``%rd90`` and on the
            addresses of the tensors.
        shared_bytes: Of ``memory``, shared memory of a block.
        traffic: Whether to count what accesses take.
        strict: As of :class:`emulator.machine.Launch`, as is ``width``.

    Raises:
        KernelFault: As the emulator does, also ``PtxError``.
    """
    parameters = ",\n".join(f"    .param .u64 tested_param_{i}" for i in range(len(tensors)))
    loads = "\n".join(
        f"    ld.param.b64 %rd{90 + i}, [tested_param_{i}];" for i in range(len(tensors))
    )
    shared = ".extern .shared .align 16 .b8 memory[];" if shared_bytes else ""
    text = _TEXT.format(
        shared=shared, parameters=parameters, threads=threads, loads=loads, body=body
    )
    return run(
        Program(parse(text)),
        Launch(grid, tuple(t.data_ptr() for t in tensors), shared_bytes, strict, width),
        GlobalMemory(map(span_of, tensors)),
        traffic,
    )
