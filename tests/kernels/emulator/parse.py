"""Read the PTX that Triton's compiler or NVIDIA's writes into instructions with operands.

What is read is the part of the language that they use for the kernels here: entries without
functions, and braces that open a scope of inline assembly. Anything else is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from emulator.errors import PtxError

# What ends a run of instructions that threads go through together.
_TERMINATORS = ("bra", "ret", "bar.sync", "bar.red")

_ENTRY = re.compile(r"(?:\.(?:visible|weak)\s+)?\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)")
_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)")
_SHARED = re.compile(r"\.extern\s+\.shared\s+.*?\b(\w+)\[\]")
# Memory of the kernel's own, a block's or a thread's.
_ARRAY = re.compile(
    r"^\s*\.(shared|local)\s+\.align\s+(\d+)\s+\.[a-z](\d+)\s+([\w$]+)(?:\[(\d+)\])?", re.MULTILINE
)
_DECLARED = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_BRACE = re.compile(r"[{}]")
_LABEL = re.compile(r"([$\w]+):\s*")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+([$\w]+)")
_PLACE = re.compile(r"^\s*\.loc\b.*//\s*(\S+:\d+):\d+", re.MULTILINE)
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})$")


@dataclass(frozen=True)
class Register:
    """A register by its name, unique in the kernel; ``kind`` is its declared type (``"b32"``)."""

    name: str
    kind: str


@dataclass(frozen=True)
class Immediate:
    """A constant, as its bits: a negative integer is itself, a float the bits of float32."""

    value: int


@dataclass(frozen=True)
class Name:
    """A special register (``"%tid.x"``), a label, a parameter, a symbol, or ``"_"`` for none."""

    text: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Name | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``, or ``a|b``, a result and a predicate."""

    parts: tuple[Register | Immediate | Name, ...]


Operand = Register | Immediate | Name | Address | Vector


@dataclass(frozen=True)
class Guard:
    """``@p`` or ``@!p``: only threads where the predicate is ``wanted`` execute."""

    register: Register
    wanted: bool


@dataclass(frozen=True)
class Instruction:
    """One instruction. ``place`` is the line of Python that it comes from, where that is known."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Guard | None
    text: str
    place: str


@dataclass
class Kernel:
    """An entry.

    Attributes:
        name: Its symbol.
        parameters: Type of each parameter, in order.
        threads: Of a block.
        shared_symbols: Names of the shared memory that a launch gives a block.
        arrays: Where arrays of the kernel's own begin in the memory of their sort (``"shared"``,
            ``"local"``), by name.
        array_bytes: What they take of each.
        segments: Instructions that threads go through together: a branch, a barrier or a return
            stands at the end of one alone, and a label at the beginning.
        labels: Index of the segment that a label begins.
    """

    name: str
    parameters: list[str]
    threads: int
    shared_symbols: tuple[str, ...]
    arrays: dict[str, tuple[str, int]] = field(default_factory=dict)
    array_bytes: dict[str, int] = field(default_factory=lambda: {"shared": 0, "local": 0})
    segments: list[list[Instruction]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def instructions(self) -> Iterator[Instruction]:
        """Every instruction, in order."""
        for segment in self.segments:
            yield from segment


def parse(ptx: str, name: str = "", threads: int = 0) -> Kernel:
    """An entry of a PTX text.

    Args:
        name: Which; by default the only one.
        threads: Of a block; by default what the text says.

    Raises:
        PtxError: There is no such entry, or more than one where none is named, or a statement is
            not understood; the message gives it.
    """
    entries = [entry for entry in _ENTRY.finditer(ptx) if name in ("", entry[1])]
    if len(entries) != 1:
        raise PtxError(f"ptx: {len(entries)} entries{name and f' {name}'}, allowed: one")
    (entry,) = entries
    said = _THREADS.search(entry[3])
    if not threads and said is None:
        raise PtxError(f"{entry[1]}: no number of threads (.reqntid, .maxntid)")
    kernel = Kernel(
        name=entry[1],
        parameters=[kind for kind, _ in _PARAMETER.findall(entry[2])],
        threads=threads or int(said[1]),
        shared_symbols=tuple(_SHARED.findall(ptx)),
    )
    body = ptx[entry.end() : _end(ptx, entry.end())]
    reader = _Body(kernel, f"{kernel.name}_param_")
    # Arrays that stand before the kernels are those of the kernels that name them.
    for array in _ARRAY.finditer(ptx, 0, entry.start()):
        if array[4] in body:
            reader.reserve(*array.groups())
    reader.read(body)
    return kernel


def _end(text: str, start: int) -> int:
    """Where the brace closes that opened before ``start``."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise PtxError("ptx: a brace is not closed")


class _Body:
    """Reads the statements of an entry into its segments."""

    def __init__(self, kernel: Kernel, parameter_prefix: str) -> None:
        self._kernel = kernel
        self._parameter_prefix = parameter_prefix
        self._scopes: list[dict[str, Register]] = [{}]
        # ``%r<9>`` declares %r0 to %r8.
        self._ranges: dict[str, str] = {}
        self._scopes_opened = 0
        self._place = ""
        self._targets: set[str] = set()

    def read(self, body: str) -> None:
        # Other labels mark places for debuggers.
        self._targets = set(_BRANCH.findall(body))
        self._kernel.segments.append([])
        for statement in _statements(body):
            found = _PLACE.match(statement)
            if found:
                self._place = found[1]
            else:
                self._statement(statement)

    def reserve(self, memory: str, alignment: str, bits: str, name: str, count: str | None) -> None:
        """Memory of the kernel's own: one number, or ``count``."""
        taken, alignment = self._kernel.array_bytes, int(alignment)
        first = -(-taken[memory] // alignment) * alignment
        self._kernel.arrays[name] = (memory, first)
        taken[memory] = first + int(bits) // 8 * int(count or 1)

    def _statement(self, text: str) -> None:
        while True:
            label = _LABEL.match(text)
            if label and not text.startswith("%"):
                if label[1] in self._targets:
                    self._begin_segment()
                    self._kernel.labels[label[1]] = len(self._kernel.segments) - 1
                text = text[label.end() :]
            elif text.startswith("{"):
                self._scopes_opened += 1
                self._scopes.append({})
                text = text[1:].lstrip()
            elif text.startswith("}"):
                self._scopes.pop()
                text = text[1:].lstrip()
            else:
                break
        if text.startswith(".reg"):
            self._declare(text)
        elif _ARRAY.match(text):
            self.reserve(*_ARRAY.match(text).groups())
        elif text.startswith((".pragma", ".file")) or not text:
            pass
        elif text.startswith("."):
            raise PtxError(f"not understood: {text}")
        else:
            self._add(text)

    def _begin_segment(self) -> None:
        if self._kernel.segments[-1]:
            self._kernel.segments.append([])

    def _declare(self, text: str) -> None:
        _, kind, names = (None, *_DECLARED.match(text).groups())
        for name in (part.strip() for part in names.split(",")):
            many = re.fullmatch(r"(%\w+?)<\d+>", name)
            if many:
                self._ranges[many[1]] = kind
            else:
                self._scopes[-1][name] = Register(f"{name}#{self._scopes_opened}", kind)

    def _add(self, text: str) -> None:
        rest, guard = text, None
        guarded = re.match(r"@(!?)([%\w]+)\s+", rest)
        if guarded:
            guard = Guard(self._register(guarded[2]), not guarded[1])
            rest = rest[guarded.end() :]
        opcode, _, operands = rest.partition(" ") if " " in rest else (rest, "", "")
        parsed = tuple(self._operand(part) for part in _split(operands))
        instruction = Instruction(opcode, parsed, guard, text, self._place)
        alone = opcode.startswith(_TERMINATORS)
        self._kernel.segments[-1].append(instruction)
        if alone:
            self._kernel.segments.append([])

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if "|" in text:
            return Vector(tuple(self._operand(part.strip()) for part in text.split("|")))
        if text.startswith("["):
            base, _, offset = (part.strip() for part in text[1:-1].partition("+"))
            return Address(self._operand(base), int(offset, 0) if offset else 0)
        if _INTEGER.match(text):
            return Immediate(int(text.rstrip("U"), 0))
        if _FLOAT.match(text):
            return Immediate(int(_FLOAT.match(text)[1], 16))
        return self._register(text) or Name(text.removeprefix(self._parameter_prefix))

    def _register(self, text: str) -> Register | None:
        for scope in reversed(self._scopes):
            if text in scope:
                return scope[text]
        numbered = re.fullmatch(r"(%[a-z]+)\d+", text)
        if numbered and numbered[1] in self._ranges:
            return Register(text, self._ranges[numbered[1]])
        return None


def _statements(body: str) -> Iterator[str]:
    """Statements in order, without comments; a line that names a place in the source is one."""
    pending = ""
    for line in body.splitlines():
        if _PLACE.match(line):
            yield line
            continue
        code = line.partition("//")[0].strip()
        if code.startswith((".loc ", ".loc\t", ".file")):
            continue
        pending = f"{pending} {code}".strip()
        while ";" in pending:
            statement, _, pending = (part.strip() for part in pending.partition(";"))
            yield re.sub(r"\s+", " ", statement)
    if pending.strip("} \t") and not pending.endswith(":"):
        yield pending


def _split(text: str) -> list[str]:
    """Operands, at the commas that stand in no braces or brackets."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        if character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
