"""Read a cubin: its instructions, and the registers and stack that the assembler reports.

By the tools that ship inside the Triton package. The disassembler of Triton 3.6.0 is older than its
assembler and does not know sm_121. The code is therefore cut out of the file and read as sm_120a's:
both have one encoding.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_ENCODING = "SM120a"
_INSTRUCTION_BYTES = 16
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_ELF_SECTION = struct.Struct("<IIQQQQIIQQ")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Usage:
    """Of one thread: 32-bit registers, and bytes of stack, which spilled registers take."""

    registers: int
    stack_bytes: int


def usage(cubin: bytes, name: str) -> Usage:
    """What the kernel ``name`` takes.

    Raises:
        ValueError: The cubin has no such kernel.
    """
    report = _run_tool("cuobjdump", "-res-usage", content=cubin)
    found = {entry: Usage(int(regs), int(stack)) for entry, regs, stack in _USAGE.findall(report)}
    if name not in found:
        raise ValueError(f"name: {name!r}, allowed: {', '.join(found) or 'none in this cubin'}")
    return found[name]


def instructions(cubins: Sequence[bytes]) -> list[Counter[str]]:
    """How often each instruction stands in each file's code, by its full name.

    Such as ``HMMA.16816.F32.BF16``. The disassembler starts once for all files: to start takes it
    longer than to read a kernel.
    """
    codes = [
        b"".join(body for name, body in sections(cubin) if name.startswith(".text."))
        for cubin in cubins
    ]
    # Often both targets have the same code.
    distinct = list(dict.fromkeys(codes))
    opcodes = _disassemble(b"".join(distinct)) if distinct else []
    counted = {}
    begin = 0
    for code in distinct:
        end = begin + len(code) // _INSTRUCTION_BYTES
        counted[code] = Counter(opcodes[begin:end])
        begin = end
    return [counted[code] for code in codes]


def _disassemble(code: bytes) -> list[str]:
    """The name of each instruction, in the order of the code."""
    listing = _run_tool("nvdisasm", "-json", "-ndf", "-b", _ENCODING, content=code)
    _, functions = json.loads(listing)
    opcodes = [
        instruction["opcode"]
        for function in functions
        for instruction in function["sass-instructions"]
    ]
    if len(opcodes) * _INSTRUCTION_BYTES != len(code):
        raise RuntimeError(
            f"nvdisasm read {len(opcodes)} instructions of {_INSTRUCTION_BYTES} bytes in"
            f" {len(code)} bytes of code"
        )
    return opcodes


def sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each section of a 64-bit little-endian ELF file.

    Raises:
        ValueError: It is no such file.
    """
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"elf: begins with {elf[:6]!r}, allowed: a 64-bit little-endian ELF file")
    header = _ELF_HEADER.unpack_from(elf)
    table, size, count, names = header[6], header[11], header[12], header[13]
    entries = [_ELF_SECTION.unpack_from(elf, table + size * index) for index in range(count)]
    names_at = entries[names][4]
    for name_offset, _, _, _, offset, length, *_ in entries:
        start = names_at + name_offset
        yield elf[start : elf.index(b"\0", start)].decode(), elf[offset : offset + length]


def _run_tool(tool: str, *options: str, content: bytes) -> str:
    """Output of one of Triton's tools on a file with this content."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(content)
        done = subprocess.run(
            [getattr(knobs.nvidia, tool).path, *options, str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{tool} failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout
