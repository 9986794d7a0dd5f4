"""Run a kernel: every thread's registers, who is where, and what the instructions do.

Threads of several blocks go in step, an array a register. Those that stand at the same instruction
execute it together; where they part, those that are furthest behind go first. At a barrier a
thread waits for all of its block that have not returned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from emulator import types
from emulator.copies import Copies
from emulator.errors import KernelFault, PtxError
from emulator.instructions import action
from emulator.local import LocalMemory
from emulator.matrix import WARP
from emulator.memory import SHARED_BASE, GlobalMemory, SharedMemory
from emulator.parse import Immediate, Instruction, Kernel, Name, Operand, Register
from emulator.traffic import Traffic, observe

# Threads that go together. More take fewer steps, each of more work.
_LANES = 8192

# What begins after a kernel's own shared memory is aligned for any access.
_SHARED_ALIGNMENT = 1024

# Steps of one group of blocks after which a kernel is taken to loop for ever.
_STEPS = 2_000_000

# Of a kernel whose blocks wait for each other: so many steps a block goes before the others.
_TURN = 256

# A mask over the lanes, or None where every lane executes.
Mask = np.ndarray | None


@dataclass(frozen=True)
class Launch:
    """Blocks in x, y and z, values of the parameters, and bytes of shared memory a block.

    ``width``: threads of a block in x, the others are in y; by default all are in x.
    ``strict``: whether a thread may not read shared memory that was never written, nor touch it in
    a race with another warp. Kernels of others do, where they load what they then do not use.
    """

    grid: tuple[int, int, int]
    parameters: tuple[int | float, ...]
    shared_bytes: int
    strict: bool = True
    width: int = 0


@dataclass
class Counts:
    """What was executed.

    Attributes:
        warps: How often a warp did each opcode.
        traffic: What the instructions took of each memory (``"shared"``, ``"global"``), by the line
            of Python and the opcode. Empty where it was not asked for.
    """

    warps: Counter[str] = field(default_factory=Counter)
    traffic: dict[tuple[str, str, str], Traffic] = field(default_factory=dict)


def run(program: Program, launch: Launch, memory: GlobalMemory, traffic: bool = False) -> Counts:
    """Run every block of a launch.

    Args:
        traffic: Whether to count what accesses take, which is slow.

    Raises:
        KernelFault: The kernel did what it may not; the message names instruction and place.
        PtxError: An instruction has operands that are not known here.
    """
    kernel, counts = program.kernel, Counts()
    x, y, z = launch.grid
    blocks = np.arange(x * y * z)
    together = blocks.size if program.blocks_wait else max(1, _LANES // kernel.threads)
    for first in range(0, blocks.size, together):
        some = blocks[first : first + together]
        Machine(program, launch, memory, some, counts, traffic).run()
    return counts


class Program:
    """A kernel with each instruction as an action.

    Raises:
        PtxError: An instruction is not known here; the message gives it.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.segments = [
            [(instruction, action(instruction, kernel)) for instruction in segment]
            for segment in kernel.segments
        ]
        self.grain = min(map(_shared_access, kernel.instructions), default=16)
        # For each other, which only memory can tell them.
        self.blocks_wait = any(".acquire" in one.opcode for one in kernel.instructions)


def _shared_access(instruction: Instruction) -> int:
    """Bytes of an access to shared memory, as far as the grain of its checks goes."""
    if instruction.opcode.startswith(("ld.shared", "st.shared")):
        return int(instruction.opcode.rpartition(".")[2][1:]) // 8
    return 4 if instruction.opcode.startswith("cp.async.ca") else 16


class Machine:
    """Some blocks of a launch, which run together.

    Attributes:
        lanes: Threads of all of them; a block's are neighbours, a warp's too.
        block: Which of the blocks here each lane belongs to.
        warp: Which warp of its block.
        shared: Their shared memory.
        local: Their threads' own memory.
        memory: Global memory.
        copies: Those to shared memory that are under way.
    """

    def __init__(
        self,
        program: Program,
        launch: Launch,
        memory: GlobalMemory,
        blocks: np.ndarray,
        counts: Counts,
        traffic: bool,
    ) -> None:
        kernel = program.kernel
        threads, arrays = kernel.threads, kernel.array_bytes
        self.lanes = blocks.size * threads
        self.block = np.repeat(np.arange(blocks.size), threads)
        thread = np.tile(np.arange(threads), blocks.size)
        self.warp = thread // WARP
        self.memory = memory
        own = -(-arrays["shared"] // _SHARED_ALIGNMENT) * _SHARED_ALIGNMENT
        self.shared = SharedMemory(
            blocks.size, own + launch.shared_bytes, program.grain, launch.strict
        )
        self.local = LocalMemory(self.lanes, arrays["local"])
        self.copies = Copies(self)
        self.parameters = launch.parameters
        self._strict = launch.strict
        self._program = program
        self._counts = counts
        self._traffic = traffic
        self._registers: dict[str, np.ndarray] = {}
        number = np.repeat(blocks, threads)
        x, y, z = launch.grid
        width = launch.width or threads
        self._special = {
            "%tid.x": thread % width,
            "%tid.y": thread // width,
            "%tid.z": np.array([0]),
            "%ctaid.x": number % x,
            "%ctaid.y": number // x % y,
            "%ctaid.z": number // (x * y),
            "%nctaid.x": np.array([x]),
            "%nctaid.y": np.array([y]),
            "%nctaid.z": np.array([z]),
            "%ntid.x": np.array([width]),
            "%ntid.y": np.array([threads // width]),
            "%ntid.z": np.array([1]),
            "%laneid": thread % WARP,
            **dict.fromkeys(kernel.shared_symbols, np.array([SHARED_BASE + own])),
        }
        bases = {"shared": SHARED_BASE, "local": 0}
        for name, (memory, first) in kernel.arrays.items():
            self._special[name] = np.array([bases[memory] + first])
        self._at = np.zeros(self.lanes, np.int64)
        self._waits = np.zeros(self.lanes, bool)
        # The barrier that a lane waits at, and how many threads it waits for; 0 is all.
        self._barrier = np.zeros(self.lanes, np.int64)
        self._awaited = np.zeros(self.lanes, np.int64)
        # What lanes bring to a barrier, and what is made of it there, by block.
        self._votes = np.zeros(self.lanes, bool)
        self._ballots: dict[int, tuple[Register, Callable[[np.ndarray], int]]] = {}
        self._returned = np.zeros(self.lanes, bool)

    def run(self) -> None:
        """Until every thread has returned."""
        with np.errstate(all="ignore"):
            for step in range(_STEPS):
                runnable = ~(self._waits | self._returned)
                if not runnable.any():
                    if self._returned.all():
                        return
                    raise KernelFault("threads wait at a barrier that others never reach")
                first = runnable
                if self._program.blocks_wait:
                    mine = runnable & (self.block == step // _TURN % (self.block[-1] + 1))
                    first = mine if mine.any() else runnable
                at = int(self._at[first].min())
                on = runnable & (self._at == at)
                self._step(at, None if on.all() else on)
        raise KernelFault(f"the kernel has not ended after {_STEPS:,} steps")

    def _step(self, at: int, on: Mask) -> None:
        segment = self._program.segments[at] if at < len(self._program.segments) else []
        self._go(on, at + 1)
        warps = self.warps_of(on)
        for instruction, act in segment:
            self._counts.warps[instruction.opcode] += warps
            try:
                executes = self._guarded(instruction, on)
                if self._traffic:
                    self._observe(instruction, executes)
                act(self, executes)
            except (KernelFault, PtxError) as error:
                where = f"{self._program.kernel.name}, {instruction.place or 'no place'}"
                raise type(error)(f"{where}: {error}: {instruction.text}") from None

    def _observe(self, instruction: Instruction, on: Mask) -> None:
        for memory, taken in observe(self, instruction, on):
            key = (memory, instruction.place, instruction.opcode)
            self._counts.traffic.setdefault(key, Traffic()).add(*taken)

    def _guarded(self, instruction: Instruction, on: Mask) -> Mask:
        guard = instruction.guard
        if guard is None:
            return on
        wanted = self.read(guard.register, np.bool_)
        wanted = np.broadcast_to(wanted if guard.wanted else ~wanted, self.lanes)
        on = wanted if on is None else on & wanted
        return None if on.all() else on

    def warps_of(self, on: Mask) -> int:
        """Number of warps of which a thread executes."""
        if on is None:
            return self.lanes // WARP
        return int(on.reshape(-1, WARP).any(axis=1).sum())

    def whole_warps(self, on: Mask) -> np.ndarray | slice:
        """Which warps execute, for an instruction that all threads of a warp execute together.

        Raises:
            KernelFault: Some threads of a warp do and some do not.
        """
        if on is None:
            return slice(None)
        executes = on.reshape(-1, WARP)
        some, every = executes.any(axis=1), executes.all(axis=1)
        if (some != every).any():
            raise KernelFault("only some threads of a warp are here")
        return every

    def selected(self, on: Mask) -> np.ndarray | slice:
        """Index of the lanes that execute."""
        return slice(None) if on is None else np.flatnonzero(on)

    def numbers(self, on: Mask) -> np.ndarray:
        """The lanes that execute, by number."""
        return np.arange(self.lanes)[self.selected(on)]

    def read(self, operand: Operand, dtype: type[np.generic]) -> np.ndarray:
        """Value of an operand, of one lane's shape where it is the same in all."""
        if isinstance(operand, Register):
            value = self._registers.get(operand.name)
            if value is None:
                value = _undefined(operand)
        elif isinstance(operand, Immediate):
            bits = 8 * np.dtype(dtype).itemsize
            number = operand.value % 2**bits if dtype is not np.bool_ else operand.value != 0
            value = np.array([number], types.unsigned(dtype))
        elif isinstance(operand, Name) and operand.text in self._special:
            value = self._special[operand.text].astype(np.uint32)
        else:
            raise PtxError(f"not an operand that has a value: {operand}")
        if value.dtype == dtype:
            return value
        return types.fit(value, types.unsigned(dtype)).view(dtype)

    def read_all(self, operand: Operand, dtype: type[np.generic]) -> np.ndarray:
        """Value of an operand in every lane."""
        value = self.read(operand, dtype)
        # numpy's function takes longer than many an instruction.
        return value if value.size == self.lanes else np.broadcast_to(value, self.lanes)

    def write(self, operand: Operand, value: np.ndarray, on: Mask) -> None:
        """Give a register a value where ``on``, in the others it keeps what it has."""
        if isinstance(operand, Name) and operand.text == "_":
            return
        bits = types.fit(value, types.unsigned(types.DTYPES[operand.kind]))
        if on is not None:
            old = self._registers.get(operand.name)
            bits = np.where(on, bits, _undefined(operand) if old is None else old)
        self._registers[operand.name] = bits

    def scatter(self, operand: Operand, value: np.ndarray, on: Mask) -> None:
        """:meth:`write` of a value that has only the lanes of ``on``."""
        if on is not None:
            whole = np.zeros(self.lanes, value.dtype)
            whole[on] = value
            value = whole
        self.write(operand, value, on)

    def branch(self, target: int, on: Mask) -> None:
        """Lanes go on at a segment."""
        self._go(on, target)

    def finish(self, on: Mask) -> None:
        """Lanes return."""
        self._returned[self.selected(on)] = True
        self._release()

    def barrier(self, on: Mask, number: int | np.ndarray = 0, awaited: int | np.ndarray = 0):
        """Lanes wait at a barrier of their block.

        Args:
            number: Which.
            awaited: For how many threads; 0 is all that have not returned.

        Raises:
            KernelFault: They wait for others than all, where races are looked for: those are told
                by barriers of all.
        """
        lanes = self.selected(on)
        if self._strict and (np.any(number) or np.any(awaited)):
            raise KernelFault("a barrier that is not all of the block's")
        self._barrier[lanes], self._awaited[lanes] = number, awaited
        self._waits[lanes] = True
        self._release()

    def vote(
        self, on: Mask, target: Register, value: np.ndarray, count: Callable[[np.ndarray], int]
    ) -> None:
        """Lanes wait for their block, and have then in a register what is made of all their values.

        Args:
            value: A predicate, in every lane.
            count: What is made of those of a block that waited.
        """
        lanes = self.selected(on)
        self._votes[lanes] = value[lanes]
        for block in np.unique(self.block[lanes]):
            self._ballots[int(block)] = target, count
        self.barrier(on)

    def _release(self) -> None:
        threads = self._program.kernel.threads
        waits = self._waits.reshape(-1, threads)
        if not self._awaited.any():
            complete = (waits | self._returned.reshape(-1, threads)).all(axis=1)
            complete &= waits.any(axis=1)
            for block in np.flatnonzero(complete):
                self.shared.barrier(block)
                if block in self._ballots:
                    target, count = self._ballots.pop(block)
                    here = self._waits & (self.block == block)
                    self.write(target, np.array([count(self._votes[here])], np.uint32), here)
            waits[complete] = False
            return
        barriers, awaited = (a.reshape(-1, threads) for a in (self._barrier, self._awaited))
        for number in np.unique(self._barrier[self._waits]):
            here = waits & (barriers == number)
            # All but those that wait elsewhere or have returned, where no number is given.
            enough = np.where(awaited > 0, awaited, threads).max(axis=1, where=here, initial=0)
            returned = self._returned.reshape(-1, threads).sum(axis=1)
            enough -= np.where((awaited > 0).any(axis=1, where=here), 0, returned)
            waits[here & (here.sum(axis=1) >= enough)[:, None]] = False

    def _go(self, on: Mask, target: int) -> None:
        self._at[self.selected(on)] = target


def _undefined(register: Register) -> np.ndarray:
    """What a register holds that was never written: all ones, which is no number in any format.

    Compilers let code read one where the result is not used, as half of a pair.
    """
    return np.invert(np.zeros(1, types.unsigned(types.DTYPES[register.kind])))
