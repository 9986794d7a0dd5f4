"""Runs a Gluon kernel on the CPU, program after program, with torch tensors in place of blocks.

Triton's interpreter does not know Gluon. This stands in for the part of Gluon that our kernels use
and shows that addresses, masks, pipeline order and arithmetic are right. It shows nothing of
layouts and barriers, which only a GPU (or the compiler) can judge.

Stricter than a GPU: shared memory is born with all bits set (NaN in each float format), what an
asynchronous copy brings appears when ``wait_group`` lets it and not before, a copy overwrites what
is read from the same place until then with that garbage, and a pointer outside its tensor is an
error even where a mask switches it off.
"""

from __future__ import annotations

import itertools
import types
from typing import Any

import torch
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.language import constexpr

_DTYPES = {
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8e4nv": torch.float8_e4m3fn,
}


class Block(torch.Tensor):
    """A block of numbers, or a scalar: a tensor whose ``to`` knows ``bitcast``."""

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Block:
        return self.view(dtype) if bitcast else torch.Tensor.to(self, dtype)

    def __iadd__(self, other: object) -> Block:  # makes a new value, as in Gluon
        return self + other


def _block(value: Any) -> Block:
    return torch.as_tensor(value).as_subclass(Block)


class Pointer:
    """Addresses in bytes into the storage of one tensor, with the type of what lies there."""

    def __init__(self, memory: torch.Tensor, offset: torch.Tensor, dtype: torch.dtype) -> None:
        self.memory, self.offset, self.dtype = memory, offset, dtype

    @classmethod
    def to_tensor(cls, tensor: torch.Tensor) -> Pointer:
        memory = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())
        start = tensor.storage_offset() * tensor.element_size()
        return cls(memory, _block(start), tensor.dtype)

    def __add__(self, elements: Any) -> Pointer:
        step = _block(elements).to(torch.int64) * self.dtype.itemsize
        return Pointer(self.memory, self.offset + step, self.dtype)

    def to(self, dtype: torch.dtype) -> Pointer:
        return Pointer(self.memory, self.offset, dtype)

    def _places(self, shape: torch.Size) -> torch.Tensor:
        first = self.offset.expand(shape)
        assert first.numel() == 0 or (
            int(first.min()) >= 0 and int(first.max()) + self.dtype.itemsize <= self.memory.numel()
        ), "an address outside its tensor"
        assert not (first % self.dtype.itemsize).any(), "an address that is not aligned"
        return first.unsqueeze(-1) + torch.arange(self.dtype.itemsize)

    def load(self, mask: Any = None, other: Any = None) -> Block:
        shape = (
            self.offset.shape
            if mask is None
            else torch.broadcast_shapes(self.offset.shape, _block(mask).shape)
        )
        if self.memory.numel() == 0:  # has no address inside; every lane must be masked off
            assert mask is not None and not _block(mask).any(), "a load from an empty tensor"
            return _block(torch.full(shape, 0 if other is None else other, dtype=self.dtype))
        places = self._places(shape)
        values = self.memory[torch.Tensor(places).long()].contiguous().view(self.dtype)
        values = values.reshape(shape)
        if mask is not None:
            # A masked lane without `other` holds anything.
            fill = _garbage(shape, self.dtype) if other is None else torch.full_like(values, other)
            values = torch.where(_block(mask).bool(), values, fill)
        return _block(values)

    def store(self, value: Any, mask: Any = None) -> None:
        value = _block(value)
        shape = torch.broadcast_shapes(self.offset.shape, value.shape)
        places = torch.Tensor(self._places(shape)).long()
        raw = value.expand(shape).contiguous().to(self.dtype).reshape(*shape, 1)
        raw = torch.Tensor.view(raw.as_subclass(torch.Tensor), torch.uint8)
        raw = raw.reshape(*shape, self.dtype.itemsize)
        if mask is None:
            self.memory[places] = raw
        else:
            chosen = _block(mask).bool().expand(shape).as_subclass(torch.Tensor)
            self.memory[places[chosen]] = raw[chosen]


def _garbage(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    raw = torch.full((*shape, dtype.itemsize), 0xFF, dtype=torch.uint8)
    return raw.view(dtype).squeeze(-1)


class Shared:
    """A shared-memory descriptor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> list[int]:
        return list(self.tensor.shape)

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < self.tensor.shape[0]
        return Shared(self.tensor[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        assert start + length <= self.tensor.shape[dim]
        return Shared(self.tensor.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.tensor.permute(order))

    def load(self, layout: Any) -> Block:
        return _block(self.tensor.clone())

    def store(self, value: torch.Tensor) -> None:
        assert value.shape == self.tensor.shape, (value.shape, self.tensor.shape)
        assert value.dtype == self.tensor.dtype, (value.dtype, self.tensor.dtype)
        self.tensor.copy_(value)


class _AsyncCopy:
    """``async_copy``: what was committed arrives when it is waited for."""

    def __init__(self) -> None:
        self.open: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.groups: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def async_copy_global_to_shared(self, smem: Shared, pointer: Pointer, mask: Any = None) -> None:
        loaded = pointer.load(mask, None if mask is None else 0)
        self.open.append((smem.tensor, loaded.expand(smem.tensor.shape)))
        smem.tensor.copy_(_garbage(smem.tensor.shape, smem.tensor.dtype))

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, num_outstanding: int = 0) -> None:
        while len(self.groups) > num_outstanding:
            for target, values in self.groups.pop(0):
                target.copy_(values)


def _mma_v2(a: torch.Tensor, b: torch.Tensor, acc: torch.Tensor) -> Block:
    assert a.dtype == b.dtype == torch.bfloat16
    return _block(torch.matmul(a.float(), b.float()) + acc)


class _Language:
    """``gluon.language``, without layouts: whatever names one is None."""

    constexpr = constexpr
    static_range = range

    def __init__(self, num_warps: int, program: tuple[int, ...]) -> None:
        self._num_warps, self._program = num_warps, program

    def __getattr__(self, name: str) -> Any:
        if name in _DTYPES:
            return _DTYPES[name]
        if name.endswith("Layout"):
            return lambda *_, **__: None
        raise AttributeError(f"gluon.language.{name} is not emulated")

    def num_warps(self) -> int:
        return self._num_warps

    def program_id(self, axis: int) -> Block:
        return _block(torch.tensor(self._program[axis], dtype=torch.int32))

    @staticmethod
    def pointer_type(dtype: torch.dtype) -> torch.dtype:
        return dtype

    @staticmethod
    def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Block:
        return pointer.load(mask, other)

    @staticmethod
    def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
        pointer.store(value, mask)

    @staticmethod
    def allocate_shared_memory(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        return Shared(_garbage([int(n) for n in shape], dtype))

    @staticmethod
    def arange(start: int, end: int, layout: Any = None) -> Block:
        return _block(torch.arange(start, end, dtype=torch.int32))

    @staticmethod
    def full(shape: list[int], value: Any, dtype: torch.dtype, layout: Any = None) -> Block:
        return _block(torch.full([int(n) for n in shape], value, dtype=dtype))

    @classmethod
    def zeros(cls, shape: list[int], dtype: torch.dtype, layout: Any = None) -> Block:
        return cls.full(shape, 0, dtype)

    @staticmethod
    def expand_dims(x: torch.Tensor, axis: int) -> Block:
        return _block(x.unsqueeze(axis))

    @staticmethod
    def reshape(x: torch.Tensor, shape: list[int]) -> Block:
        return _block(x.reshape([int(n) for n in shape]))

    @staticmethod
    def convert_layout(x: Any, layout: Any, assert_trivial: bool = False) -> Any:
        return x

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        return _block(torch.where(_block(condition).bool(), _block(x), _block(y)))

    @staticmethod
    def minimum(x: Any, y: Any) -> Block:
        return _block(torch.minimum(_block(x), _block(y)))

    @staticmethod
    def maximum(x: Any, y: Any) -> Block:
        return _block(torch.maximum(_block(x), _block(y)))

    @staticmethod
    def max(x: torch.Tensor, axis: int) -> Block:
        return _block(x.amax(axis))

    @staticmethod
    def sum(x: torch.Tensor, axis: int) -> Block:
        return _block(x.sum(axis, dtype=x.dtype))

    @staticmethod
    def exp2(x: torch.Tensor) -> Block:
        return _block(torch.exp2(x))

    @staticmethod
    def log2(x: torch.Tensor) -> Block:
        return _block(torch.log2(x))


def _function(kernel: GluonJITFunction, language: _Language, copies: _AsyncCopy):
    """The kernel's Python function, with the modules that it uses replaced."""
    names = dict(kernel.fn.__globals__)
    for name, value in names.items():
        if isinstance(value, constexpr):
            names[name] = value.value
        elif isinstance(value, GluonJITFunction) and name in kernel.fn.__code__.co_names:
            names[name] = _function(value, language, copies)
    names |= {"gl": language, "async_copy": copies, "mma_v2": _mma_v2}
    return types.FunctionType(kernel.fn.__code__, names, kernel.__name__)


class OnCpu:
    """Stands in for a Gluon kernel: ``OnCpu(kernel)[grid](..., num_warps=8)``."""

    def __init__(self, kernel: GluonJITFunction) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*args: Any, num_warps: int, num_stages: int = 1, maxnreg: int = 0, **flags: Any):
            values = [
                Pointer.to_tensor(value)
                if isinstance(value, torch.Tensor)
                else _block(value)
                if type(value) in (int, float)
                else value
                for value in args
            ]
            for program in itertools.product(*(range(n) for n in grid)):
                copies = _AsyncCopy()
                language = _Language(num_warps, program)
                _function(self.kernel, language, copies)(*values, **flags)
                assert not copies.open and not copies.groups, "copies that nobody waited for"

        return launch
