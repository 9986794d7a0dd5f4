"""What instructions do that look at more than one thread's registers, and the choice among all.

An action is called with the machine and a mask of the lanes that execute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from emulator import arithmetic, matrix, types
from emulator.errors import KernelFault, PtxError
from emulator.matrix import WARP
from emulator.parse import Address, Immediate, Instruction, Kernel, Operand, Vector

if TYPE_CHECKING:
    from emulator.machine import Machine, Mask

    Action = Callable[[Machine, Mask], None]


# The mask that names all threads of a warp.
_WHOLE_WARP = np.uint32(0xFFFFFFFF)


def action(instruction: Instruction, kernel: Kernel) -> Action:
    """What an instruction does.

    Raises:
        PtxError: It is not known here.
    """
    opcode, operands = instruction.opcode, instruction.operands
    for prefix, make in _ACTIONS.items():
        if opcode == prefix or opcode.startswith(f"{prefix}."):
            return make(opcode, operands, kernel)
    found = arithmetic.simple(opcode)
    if found is not None:
        return _simple(operands, *found)
    converted = arithmetic.conversion(opcode)
    if converted is not None:
        return _simple(operands, (converted[0],), converted[1])
    raise PtxError(f"{kernel.name}: not known: {instruction.text}")


def _simple(operands, kinds, function) -> Action:
    target, *sources = operands
    dtypes = [kinds[min(i, len(kinds) - 1)] for i in range(len(sources))]

    def act(machine: Machine, on: Mask) -> None:
        values = [machine.read(s, d) for s, d in zip(sources, dtypes, strict=True)]
        machine.write(target, function(*values), on)

    return act


def _move(opcode, operands, kernel) -> Action:
    target, source = operands
    dtype = types.DTYPES[opcode.rpartition(".")[2]]
    size = np.dtype(dtype).itemsize

    def pack(machine: Machine, on: Mask) -> None:
        part = np.dtype(f"u{size // len(source.parts)}").type
        parts = [machine.read_all(one, part) for one in source.parts]
        machine.write(target, np.stack(parts, axis=1).view(dtype).reshape(-1), on)

    def unpack(machine: Machine, on: Mask) -> None:
        part = np.dtype(f"u{size // len(target.parts)}").type
        whole = np.ascontiguousarray(machine.read_all(source, dtype))
        values = whole.view(part).reshape(-1, len(target.parts)).T
        for one, value in zip(target.parts, values, strict=True):
            machine.write(one, np.ascontiguousarray(value), on)

    if isinstance(source, Vector):
        return pack
    if isinstance(target, Vector):
        return unpack
    return _simple(operands, (dtype,), lambda value: value)


def _load_parameter(opcode, operands, kernel) -> Action:
    target, address = operands
    dtype = types.DTYPES[opcode.rpartition(".")[2]]
    number = int(address.base.text)
    declared = kernel.parameters[number]

    def act(machine: Machine, on: Mask) -> None:
        value = np.array([machine.parameters[number]], types.DTYPES[declared])
        machine.write(target, value.view(dtype), on)

    return act


def _addresses(machine: Machine, address: Address, on: Mask, dtype) -> np.ndarray:
    base = machine.read_all(address.base, dtype)[machine.selected(on)]
    return base + np.array(address.offset, np.int64).astype(dtype)


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _load(opcode, operands, kernel) -> Action:
    target, address = operands
    dtype = types.DTYPES[opcode.rpartition(".")[2]]
    size, parts, is_shared = np.dtype(dtype).itemsize, _parts(target), ".shared" in opcode

    def act(machine: Machine, on: Mask) -> None:
        lanes = machine.selected(on)
        if on is not None and not lanes.size:
            return
        if opcode.startswith("ld.local"):
            at = _addresses(machine, address, on, np.uint64)
            found = machine.local.load(machine.numbers(on), at, size, len(parts))
        elif is_shared:
            at = _addresses(machine, address, on, np.uint32)
            found = machine.shared.load(
                machine.block[lanes], machine.warp[lanes], at, size, len(parts)
            )
        else:
            at = _addresses(machine, address, on, np.uint64)
            found = machine.memory.load(at, size, len(parts))
        for part, value in zip(parts, found, strict=True):
            machine.scatter(part, value.view(dtype), on)

    return act


def _store(opcode, operands, kernel) -> Action:
    address, source = operands
    dtype = types.unsigned(types.DTYPES[opcode.rpartition(".")[2]])
    parts, is_shared = _parts(source), ".shared" in opcode

    def act(machine: Machine, on: Mask) -> None:
        lanes = machine.selected(on)
        if on is not None and not lanes.size:
            return
        words = [machine.read_all(part, dtype)[lanes] for part in parts]
        if opcode.startswith("st.local"):
            at = _addresses(machine, address, on, np.uint64)
            machine.local.store(machine.numbers(on), at, words)
        elif is_shared:
            at = _addresses(machine, address, on, np.uint32)
            machine.shared.store(machine.block[lanes], machine.warp[lanes], at, words)
        else:
            machine.memory.store(_addresses(machine, address, on, np.uint64), words)

    return act


_ATOMIC = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "exch": lambda old, new: new,
}


def _atomic(opcode, operands, kernel) -> Action:
    """``atom`` and ``red``: threads one after another; the former gives what was there before."""
    *parts, operation, kind = opcode.split(".")
    dtype = types.DTYPES[kind]
    target, (address, *sources) = (
        (None, operands) if parts[0] == "red" else (operands[0], operands[1:])
    )
    is_shared = "shared" in parts
    if not (is_shared or "global" in parts) or operation not in (*_ATOMIC, "cas"):
        raise PtxError(f"{kernel.name}: not known: {opcode}")

    def new(old: np.ndarray, values: list[np.ndarray]) -> np.ndarray:
        if operation == "cas":
            return values[1] if old == values[0] else old
        return _ATOMIC[operation](old, values[0])

    def act(machine: Machine, on: Mask) -> None:
        lanes = machine.numbers(on)
        at = _addresses(machine, address, on, np.uint32 if is_shared else np.uint64)
        values = [machine.read_all(source, dtype)[lanes] for source in sources]
        before = np.empty(lanes.size, dtype)
        for index, lane in enumerate(lanes):
            one = slice(index, index + 1)
            if is_shared:
                memory, who = machine.shared, (machine.block[[lane]], machine.warp[[lane]])
            else:
                memory, who = machine.memory, ()
            (old,) = memory.load(*who, at[one], before.itemsize, 1)
            before[one] = old.view(dtype)
            after = new(before[one], [value[one] for value in values])
            memory.store(*who, at[one], [after.astype(dtype).view(types.unsigned(dtype))])
        if target is not None:
            machine.scatter(target, before, on)

    return act


def _copy(opcode, operands, kernel) -> Action:
    """``cp.async``: a copy of so many bytes; past a smaller number given last, zeros."""
    target, source, size_operand, *given = operands
    size = size_operand.value
    word = min(size, 4)

    def act(machine: Machine, on: Mask) -> None:
        lanes = machine.numbers(on)
        if not lanes.size:
            return
        bytes_read = machine.read_all(given[0], np.uint32)[lanes] if given else None
        at = _addresses(machine, source, on, np.uint64)
        words = [np.zeros(lanes.size, np.uint32) for _ in range(size // word)]
        for index, value in enumerate(words):
            reads = slice(None) if bytes_read is None else bytes_read > word * index
            if bytes_read is not None and (bytes_read % word).any():
                raise PtxError("a copy of a part of a word")
            if at[reads].size:
                value[reads] = machine.memory.load(at[reads] + np.uint64(word * index), word, 1)[0]
        place = machine.shared.begin_copy(
            machine.block[lanes],
            machine.warp[lanes],
            _addresses(machine, target, on, np.uint32),
            size,
        )
        machine.copies.begin(lanes, place, words)

    return act


def _commit(opcode, operands, kernel) -> Action:
    return lambda machine, on: machine.copies.commit(on)


def _wait(opcode, operands, kernel) -> Action:
    allowed = operands[0].value
    return lambda machine, on: machine.copies.wait(on, allowed)


def _wait_all(opcode, operands, kernel) -> Action:
    """For every copy of the thread, also those of no group yet."""

    def act(machine: Machine, on: Mask) -> None:
        machine.copies.commit(on)
        machine.copies.wait(on, 0)

    return act


def _load_matrix(opcode, operands, kernel) -> Action:
    target, address = operands
    parts, transposed = _parts(target), ".trans" in opcode

    def act(machine: Machine, on: Mask) -> None:
        warps = machine.whole_warps(on)
        at = machine.read_all(address.base, np.uint32) + np.uint32(address.offset)
        for number, part in enumerate(parts):
            block, warp, rows = _matrix_rows(machine, warps, at, number)
            words = machine.shared.load(block, warp, rows, 4, 4)
            matrices = np.stack(words, axis=1).view(np.uint16).reshape(-1, 8, 8)
            fragment = matrix.rows_to_fragment(matrices, transposed).reshape(-1)
            machine.scatter(part, fragment, on)

    return act


def _store_matrix(opcode, operands, kernel) -> Action:
    address, source = operands
    parts, transposed = _parts(source), ".trans" in opcode

    def act(machine: Machine, on: Mask) -> None:
        warps = machine.whole_warps(on)
        at = machine.read_all(address.base, np.uint32) + np.uint32(address.offset)
        for number, part in enumerate(parts):
            block, warp, rows = _matrix_rows(machine, warps, at, number)
            fragment = machine.read_all(part, np.uint32).reshape(-1, WARP)[warps]
            matrices = matrix.fragment_to_rows(fragment, transposed).reshape(-1, 8)
            words = np.ascontiguousarray(matrices).view(np.uint32)
            machine.shared.store(
                block, warp, rows, [np.ascontiguousarray(word) for word in words.T]
            )

    return act


def _matrix_rows(machine, warps, at, number):
    """Block, warp and address of each row of a matrix: threads from ``8 * number`` on give them."""
    columns = slice(8 * number, 8 * number + 8)
    return tuple(
        values.reshape(-1, WARP)[warps][:, columns].reshape(-1)
        for values in (machine.block, machine.warp, at)
    )


def _multiply(opcode, operands, kernel) -> Action:
    if opcode == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32":
        element = "bf16"
    elif opcode == "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32":
        element = "e4m3"
    else:
        raise PtxError(f"{kernel.name}: not known: {opcode}")
    target, *sources = operands

    def act(machine: Machine, on: Mask) -> None:
        warps = machine.whole_warps(on)
        a, b, c = (
            np.stack([machine.read_all(r, dtype).reshape(-1, WARP)[warps] for r in _parts(source)])
            for source, dtype in zip(sources, (np.uint32, np.uint32, np.float32), strict=True)
        )
        product = matrix.multiply(a, b, c, element)
        for register, value in zip(_parts(target), product, strict=True):
            machine.scatter(register, value.reshape(-1), on)

    return act


def _shuffle(opcode, operands, kernel) -> Action:
    target, source, distance, bounds, members = operands
    mode = opcode.split(".")[2]
    lane = np.arange(WARP)

    def act(machine: Machine, on: Mask) -> None:
        warps = machine.whole_warps(on)
        value = machine.read_all(source, np.uint32).reshape(-1, WARP)[warps]
        by = machine.read_all(distance, np.uint32).reshape(-1, WARP)[warps].astype(np.int64)
        bound = machine.read_all(bounds, np.uint32).reshape(-1, WARP)[warps].astype(np.int64)
        clamp, segment = bound & 31, (bound >> 8) & 31
        highest = (lane & segment) | (clamp & ~segment)
        if mode == "up":
            other = lane - by
            valid = other >= highest
        elif mode == "down":
            other = lane + by
            valid = other <= highest
        elif mode == "bfly":
            other = lane ^ by
            valid = other <= highest
        elif mode == "idx":
            other = (lane & segment) | (by & ~segment)
            valid = other <= highest
        else:
            raise PtxError(f"not known: {opcode}")
        chosen = np.where(valid, other, lane)
        named = machine.read_all(members, np.uint32).reshape(-1, WARP)[warps]
        if not (named >> lane.astype(np.uint32) & named >> chosen.astype(np.uint32) & 1).all():
            raise KernelFault("a thread shuffles with one that it does not name, or without itself")
        result, *was_valid = _parts(target)
        machine.scatter(result, np.take_along_axis(value, chosen, axis=1).reshape(-1), on)
        for predicate in was_valid:
            valid = np.broadcast_to(valid, chosen.shape)
            machine.scatter(predicate, np.ascontiguousarray(valid).reshape(-1), on)

    return act


def _reduce(opcode, operands, kernel) -> Action:
    """``redux.sync``: over the threads that the mask names, in each of them."""
    target, source, members = operands
    dtype = types.DTYPES[opcode.rpartition(".")[2]]
    function, neutral = {
        "add": (np.add, 0),
        "max": (np.maximum, np.iinfo(dtype).min),
        "min": (np.minimum, np.iinfo(dtype).max),
    }[opcode.split(".")[2]]
    neutral = np.array(neutral, dtype)

    def act(machine: Machine, on: Mask) -> None:
        warps = machine.whole_warps(on)
        value = machine.read_all(source, dtype).reshape(-1, WARP)[warps]
        mask = machine.read_all(members, np.uint32).reshape(-1, WARP)[warps]
        if (mask == _WHOLE_WARP).all():
            whole = function.reduce(value, axis=1).astype(dtype)
            machine.scatter(target, np.repeat(whole, WARP), on)
            return
        found = np.empty_like(value)
        # Threads of one mask are one group.
        for lane in range(WARP):
            member = (mask[:, lane, None] >> np.arange(WARP, dtype=np.uint32)) & np.uint32(1) == 1
            if not member[:, lane].all():
                raise KernelFault("a thread reduces over others without itself")
            found[:, lane] = function.reduce(np.where(member, value, neutral), axis=1)
        machine.scatter(target, found.reshape(-1), on)

    return act


def _branch(opcode, operands, kernel) -> Action:
    target = kernel.labels[operands[0].text]
    return lambda machine, on: machine.branch(target, on)


def _return(opcode, operands, kernel) -> Action:
    return lambda machine, on: machine.finish(on)


def _barrier(opcode, operands, kernel) -> Action:
    """``bar.sync``: which barrier, and for how many threads, all of the block unless that is
    given."""
    number, *awaited = operands

    def act(machine: Machine, on: Mask) -> None:
        lanes = machine.selected(on)
        values = [machine.read_all(one, np.uint32)[lanes] for one in (number, *awaited)]
        machine.barrier(on, *(value.astype(np.int64) for value in values))

    return act


_VOTES = {"and.pred": np.all, "or.pred": np.any, "popc.u32": np.count_nonzero}


def _vote(opcode, operands, kernel) -> Action:
    """``bar.red``: a barrier of all, and what their predicates come to."""
    count = _VOTES.get(opcode.removeprefix("bar.red."))
    target, number, predicate = operands
    if count is None or number != Immediate(0):
        raise PtxError(f"{kernel.name}: not known: {opcode} {number}")

    def act(machine: Machine, on: Mask) -> None:
        machine.vote(on, target, machine.read_all(predicate, np.bool_), count)

    return act


def _nothing(opcode, operands, kernel) -> Action:
    return lambda machine, on: None


_ACTIONS: dict[str, Callable[..., Action]] = {
    "ld.param": _load_parameter,
    "ld.global": _load,
    "ld.shared": _load,
    "st.global": _store,
    "st.shared": _store,
    "ld.local": _load,
    "st.local": _store,
    "atom": _atomic,
    "red": _atomic,
    "cp.async.commit_group": _commit,
    "cp.async.wait_group": _wait,
    "cp.async.wait_all": _wait_all,
    "cp.async.cg": _copy,
    "cp.async.ca": _copy,
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
    "mma": _multiply,
    "shfl.sync": _shuffle,
    "redux.sync": _reduce,
    "mov": _move,
    "bra": _branch,
    "ret": _return,
    "bar.sync": _barrier,
    "bar.red": _vote,
    # Threads of a warp are in step, and kernels of a stream run one after another.
    "bar.warp.sync": _nothing,
    "griddepcontrol": _nothing,
    "prefetch": _nothing,
    # Threads see what others wrote at once.
    "fence": _nothing,
    "membar": _nothing,
    # An address is one number in its own space and in the whole.
    "cvta": _move,
}
