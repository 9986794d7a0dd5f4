"""Launches that skip Triton's search for the compiled kernel."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.jit import JITFunction

import vllm_sm12x.ops
from vllm_sm12x.ops import launch_cache
from vllm_sm12x.ops.integers import cdiv, next_power_of_2
from vllm_sm12x.ops.launch_cache import launch
from vllm_sm12x.ops.launching import compile_only

MEMORY = torch.zeros(64, dtype=torch.uint8)

# Arguments of every sort that Triton tells apart, and neighbours of its limits.
ARGUMENTS = (
    *(-(2**31) - 1, -(2**31), -1, 0, 1, 2, 15, 16, 17, 2**31 - 1, 2**31, 2**63 - 1, 2**63),
    *(0.0, 1.0, 16.0, True, False, None),
    *(MEMORY[offset:] for offset in range(18)),
    MEMORY.view(torch.float32),
    MEMORY.view(torch.bfloat16),
    MEMORY.view(torch.bfloat16)[1:],
    torch.nn.Parameter(MEMORY.view(torch.float32)),
)


@triton.jit
def add(x, n, by: tl.constexpr, more: tl.constexpr):
    tl.store(x, tl.load(x) + n + by + more)


@triton.jit
def add_too(x, n, by: tl.constexpr, more: tl.constexpr):
    tl.store(x, tl.load(x) + n + by + more)


class Compiled(CompiledKernel):
    """What Triton compiled; it writes down what it was launched with."""

    def __init__(self, launches: list[tuple[object, ...]]):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, *arguments))


class Triton:
    """Stands where Triton's own launch is and says what reaches it."""

    def __init__(self):
        self.searched: list[tuple[object, ...]] = []
        self.launched: list[tuple[object, ...]] = []

    def run(self, kernel, *arguments, grid, warmup, **options):
        self.searched.append((kernel, warmup, grid, *arguments))
        return Compiled(self.launched)


@pytest.fixture
def seen(monkeypatch) -> Triton:
    stand_in = Triton()
    monkeypatch.setattr(
        JITFunction, "run", lambda kernel, *a, **options: stand_in.run(kernel, *a, **options)
    )
    gpu = SimpleNamespace(get_current_device=lambda: 7)
    monkeypatch.setattr(launch_cache, "driver", SimpleNamespace(active=gpu))
    launch_cache.clear_cache()
    yield stand_in
    launch_cache.clear_cache()


def test_the_second_launch_goes_straight_to_the_kernel(seen):
    """With its own grid and tensors, and the constants in the order of the signature."""
    x, y = torch.zeros(4), torch.zeros(4)
    launch(add, (3, 1, 1), x, 5, more=8, by=7, num_warps=2)
    launch(add, (4, 2, 1), y, 5, more=8, by=7, num_warps=2)
    assert seen.searched == [(add, False, (3, 1, 1), x, 5)]
    ((grid, tensor, *numbers),) = seen.launched
    assert (grid, tensor is y, numbers) == ((4, 2, 1), True, [5, 7, 8])


@pytest.mark.parametrize(
    "another",
    [
        lambda x: launch(add_too, (1, 1, 1), x, 5, by=7, more=8, num_warps=2),
        lambda x: launch(add, (1, 1, 1), x, 6, by=7, more=8, num_warps=2),
        lambda x: launch(add, (1, 1, 1), x, 5, by=6, more=8, num_warps=2),
        lambda x: launch(add, (1, 1, 1), x, 5, by=7, more=8, num_warps=4),
        lambda x: launch(add, (1, 1, 1), x, 5, by=7, more=8, num_warps=2, arch="sm120"),
        lambda x: launch(add, (1, 1, 1), x[1:], 5, by=7, more=8, num_warps=2),
        lambda x: launch(add, (1, 1, 1), x.bfloat16(), 5, by=7, more=8, num_warps=2),
        lambda x: launch(add, (1, 1, 1), None, 5, by=7, more=8, num_warps=2),
    ],
    ids=["kernel", "number", "constant", "warps", "lowering", "alignment", "dtype", "none"],
)
def test_another_launch_is_looked_for(seen, another):
    x = torch.zeros(4)
    launch(add, (1, 1, 1), x, 5, by=7, more=8, num_warps=2)
    another(x)
    assert (len(seen.searched), seen.launched) == (2, [])


def test_another_gpu_has_kernels_of_its_own(seen, monkeypatch):
    x = torch.zeros(4)
    launch(add, (1, 1, 1), x, 5, by=7, more=8)
    monkeypatch.setattr(launch_cache.driver.active, "get_current_device", lambda: 8)
    launch(add, (1, 1, 1), x, 5, by=7, more=8)
    assert (len(seen.searched), seen.launched) == (2, [])


def test_what_only_compiles_reaches_triton(seen):
    """Each time, also where it was launched before."""
    x = torch.zeros(4)
    launch(add, (1, 1, 1), x, 5, by=7, more=8)
    with compile_only((12, 0)) as compilation:
        launch(add, (1, 1, 1), x, 5, by=7, more=8)
        launch(add, (1, 1, 1), x, 5, by=7, more=8)
    assert [warmup for _, warmup, *_ in seen.searched] == [False, True, True]
    assert (len(compilation.kernels), seen.launched) == (2, [])


def test_memory_of_launches_is_bounded(seen, monkeypatch):
    monkeypatch.setattr(launch_cache, "_MOST", 3)
    x = torch.zeros(4)
    for n in range(10):
        launch(add, (1, 1, 1), x, n, by=7, more=8)
        assert len(launch_cache._found) <= 3
    assert len(seen.searched) == 10


def test_what_triton_tells_apart_is_told_apart():
    """By Triton's own reading of an argument: what it compiles two kernels for is not alike here.

    A Triton that tells more apart, such as the alignment to more bytes, fails here.
    """
    backend = make_backend(GPUTarget("cuda", 120, 32))

    def triton_reads(argument: object) -> object:
        return native_specialize_impl(backend, argument, False, True, True)

    taken: list[object] = []
    for argument in ARGUMENTS:
        kinds = launch_cache._kinds((argument,))
        assert len(kinds) == 1
        taken.append(kinds[0])
    for (one, its), (other, others) in itertools.combinations(
        zip(ARGUMENTS, taken, strict=True), 2
    ):
        if triton_reads(one) != triton_reads(other):
            assert its != others, (one, other)


def test_constants_come_last():
    """In every kernel: they are handed over behind the arguments."""
    kernels = {
        kernel
        for module in pkgutil.walk_packages(vllm_sm12x.ops.__path__, "vllm_sm12x.ops.")
        for name, kernel in vars(importlib.import_module(module.name)).items()
        if name.endswith("_kernel") and isinstance(kernel, JITFunction)
    }
    assert len(kernels) >= 15
    for kernel in kernels:
        constants = [parameter.is_constexpr for parameter in kernel.params]
        assert constants == sorted(constants), kernel


def test_rounding():
    for a, b in itertools.product((0, 1, 7, 8, 9, 4096), (1, 3, 8)):
        assert cdiv(a, b) == triton.cdiv(a, b)
    for n in (1, 2, 3, 4, 5, 127, 128, 129):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
