"""Compile a case for SM12x, without a GPU, and judge what came out.

A kernel fails where registers are spilled, where a block has more shared memory than it may, where
an expected matrix instruction is missing, and where it does not compile.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_sm12x import lowering
from vllm_sm12x.lowering import SHARED_MEMORY_LIMIT
from vllm_sm12x.proof import machine_code
from vllm_sm12x.proof.case import CompileCase
from vllm_sm12x.proof.hardware import Occupancy, occupancy

if TYPE_CHECKING:
    from triton.compiler import ASTSource, CompiledKernel

# Target of the assembler: capability.
TARGETS = {"sm_120a": (12, 0), "sm_121a": (12, 1)}


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes and does.

    Attributes:
        registers: A thread.
        stack_bytes: A thread.
        shared_bytes: A block.
        num_warps: A block; more than the case asks for where the kernel is warp-specialised.
        instructions: How often each stands in the code, by full name.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    instructions: Counter[str]

    @property
    def matrix_instructions(self) -> dict[str, int]:
        """Those that multiply matrices: HMMA (16 bit), QMMA (8, 6 and 4 bit) and their like."""
        return {
            name: count
            for name, count in sorted(self.instructions.items())
            if name.partition(".")[0].endswith("MMA")
        }

    @property
    def local_stores(self) -> int:
        """Stores to the stack (STL)."""
        return self._count("STL")

    @property
    def local_loads(self) -> int:
        """Loads from the stack (LDL)."""
        return self._count("LDL")

    @property
    def occupancy(self) -> Occupancy:
        """On a multiprocessor of SM12x."""
        return occupancy(self.registers, self.num_warps, self.shared_bytes)

    def has(self, instruction: str) -> bool:
        """Whether an instruction whose name begins with these parts is in the code."""
        return any(f"{name}.".startswith(f"{instruction}.") for name in self.instructions)

    def _count(self, opcode: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.partition(".")[0] == opcode)


@dataclass(frozen=True)
class Report:
    """One case on one target. ``compiled`` is ``None`` where it does not compile."""

    case: CompileCase
    target: str
    compiled: Compiled | None
    failures: tuple[str, ...]


def examine(case: CompileCase, target: str) -> Report:
    """Compile ``case`` for ``target`` (a key of :data:`TARGETS`) and judge it.

    A failure says which kernel and configuration, what was found and what is allowed.

    Raises:
        ValueError: The target is none of these, or the kernel is an interpreted one.
    """
    (report,) = examine_all([(case, target)])
    return report


def examine_all(work: Iterable[tuple[CompileCase, str]], at_once: int = 16) -> Iterator[Report]:
    """As :func:`examine`, of many cases in less time: the disassembler starts once for several.

    Args:
        work: Cases, each with its target.
        at_once: How many are compiled before their reports come.

    Raises:
        ValueError: As :func:`examine`.
    """
    left = iter(work)
    while batch := list(itertools.islice(left, at_once)):
        built = [_compile(case, target) for case, target in batch]
        kernels = [kernel for kernel in built if not isinstance(kernel, str)]
        counts = iter(machine_code.instructions([kernel.asm["cubin"] for kernel in kernels]))
        for (case, target), kernel in zip(batch, built, strict=True):
            where = f"{target}: {case.kernel_name} ({case.config_text})"
            if isinstance(kernel, str):
                yield Report(case, target, None, (f"{where} does not compile: {kernel}",))
                continue
            compiled = _measure(kernel, next(counts))
            failures = tuple(f"{where}: {failure}" for failure in judge(case, compiled))
            yield Report(case, target, compiled, failures)


def source_of(case: CompileCase) -> ASTSource:
    """The kernel with types and values, as Triton's compiler takes it.

    Raises:
        ValueError: The kernel is an interpreted one.
    """
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(case.kernel, JITFunction):
        raise ValueError(
            f"{case.label}: the kernel is a {type(case.kernel).__name__}, allowed: a triton.jit"
            " function, defined while TRITON_INTERPRET is not set"
        )
    make = ASTSource
    if case.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as make
    names = case.kernel.arg_names
    return make(
        case.kernel,
        {name: case.signature.get(name, "constexpr") for name in names},
        dict(case.constexprs),
        {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16},
    )


def _compile(case: CompileCase, target: str) -> CompiledKernel | str:
    """What Triton makes of a case; or why it, or its assembler, refuses it."""
    import triton
    from triton.backends.compiler import GPUTarget

    if target not in TARGETS:
        raise ValueError(f"target: {target!r}, allowed: {', '.join(TARGETS)}")
    source = source_of(case)
    capability = TARGETS[target]
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.maxnreg is not None:
        options["maxnreg"] = case.maxnreg
    options |= lowering.launch_options(capability)
    gpu = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    try:
        # Triton prints the whole of what its assembler refuses; standard output is the table's.
        with contextlib.redirect_stdout(sys.stderr):
            return triton.compile(source, target=gpu, options=options)
    except Exception as error:
        # Passes of the compiler raise RuntimeError, its frontend and the assembler their own.
        return f"{type(error).__name__}: {error}"


def _measure(kernel: CompiledKernel, instructions: Counter[str]) -> Compiled:
    usage = machine_code.usage(kernel.asm["cubin"], kernel.metadata.name)
    return Compiled(
        registers=usage.registers,
        stack_bytes=usage.stack_bytes,
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        instructions=instructions,
    )


def judge(case: CompileCase, compiled: Compiled) -> list[str]:
    """What is wrong with a compiled case, a sentence each: what was found, what is allowed."""
    found = []
    if compiled.stack_bytes or compiled.local_stores or compiled.local_loads:
        found.append(
            f"spills: {compiled.stack_bytes} bytes of stack, {compiled.local_stores} STL,"
            f" {compiled.local_loads} LDL with {compiled.registers} registers; allowed: none"
        )
    if compiled.shared_bytes > SHARED_MEMORY_LIMIT:
        found.append(
            f"shared memory: {compiled.shared_bytes:,} bytes, allowed: {SHARED_MEMORY_LIMIT:,}"
        )
    for instruction in case.instructions:
        if not compiled.has(instruction):
            have = matrix_text(compiled) or "none"
            found.append(f"no {instruction}; the matrix instructions found: {have}")
    return found


def matrix_text(compiled: Compiled) -> str:
    """The matrix instructions with their number, in one line."""
    return ", ".join(f"{count} {name}" for name, count in compiled.matrix_instructions.items())
