"""vLLM's TileLang kernels on the emulated GPU, called by vLLM's own Python.

TileLang makes CUDA C++ of them, nvcc PTX of that, for SM120, as both do on such a GPU at start.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import nvcc
from emulator.machine import Program
from emulator.parse import parse
from native_kernels import EmulatedStream

_TARGET = {"kind": "cuda", "arch": nvcc.ARCH, "max_num_threads": 1024, "thread_warp_size": 32}
_HEAD = re.compile(r'extern "C" __global__ void __launch_bounds__\((\d+), 1\) (\w+)\((.*)\) \{')
# Headers that TileLang names in every source, of operations that these kernels do not have. They
# take half of the compiler's time.
_UNUSED = re.compile(r"#include <tl_templates/cuda/(gemm|ldsm|threadblock_swizzle|debug)\.h>\n")


@contextmanager
def emulated_tilelang(stream: EmulatedStream) -> Iterator[ModuleType]:
    """vLLM's ``_tilelang_ops``, whose kernels run on a stream with tensors of the CPU."""
    module = _module()
    with ExitStack() as stack:
        for name, jit in list(vars(module).items()):
            if hasattr(jit, "get_tir"):
                launch = functools.partial(_launch, stream, jit)
                stack.enter_context(patch.object(module, name, launch))
        yield module


@functools.cache
def _module() -> ModuleType:
    """The module as it is where there is a GPU."""
    from vllm import platforms

    gpu = SimpleNamespace(
        is_cuda_alike=lambda: True, is_cuda=lambda: True, is_arch_support_pdl=lambda: True
    )
    with patch.object(platforms, "_current_platform", gpu):
        return importlib.import_module("vllm._tilelang_ops")


def _launch(stream: EmulatedStream, jit: Any, *arguments: Any, **more: Any) -> None:
    """Run a kernel as TileLang and nvcc compile it for these sizes."""
    from tilelang import tvm
    from tilelang.engine.lower import lower

    # As TileLang, which lets names pass that a kernel does not have.
    known = {name: value for name, value in more.items() if name in jit.signature.parameters}
    given = jit.signature.bind(*arguments, **known).arguments
    function = jit.get_tir(**given)
    target = tvm.target.Target(_TARGET)
    passes = {key.value: value for key, value in jit.pass_configs.items()}
    with target, tvm.transform.PassContext(opt_level=3, config=passes):
        source = lower(function, target=target).kernel_source
    program, parameters = _program(source)
    # Sizes that the kernel does not fix are those of the tensors.
    sizes = {
        size: given[parameter.name].size(dimension)
        for parameter, buffer in function.buffer_map.items()
        for dimension, size in enumerate(buffer.shape)
        if isinstance(size, tvm.tir.Var)
    }
    given.update((size.name, value) for size, value in sizes.items())
    stream.launch(program, _grid(function, sizes), [given[name] for name in parameters])


def _grid(function: Any, sizes: dict[Any, int]) -> tuple[int, int, int]:
    """How many blocks a kernel has, with these sizes."""
    from tilelang import tvm

    extents = {f"blockIdx.{axis}": tvm.tir.IntImm("int32", 1) for axis in "xyz"}

    def find(node: Any) -> None:
        if getattr(node, "attr_key", "") == "thread_extent":
            extents[str(node.node.thread_tag)] = node.value

    tvm.tir.stmt_functor.post_order_visit(function.body, find)
    simplify = tvm.arith.Analyzer().simplify
    x, y, z = (
        int(simplify(tvm.tir.stmt_functor.substitute(extents[f"blockIdx.{axis}"], sizes)))
        for axis in "xyz"
    )
    return x, y, z


@functools.cache
def _program(source: str) -> tuple[Program, tuple[str, ...]]:
    """The kernel of a source, and the names of its parameters."""
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

    threads, symbol, parameters = _HEAD.search(source).groups()
    names = tuple(parameter.split()[-1] for parameter in parameters.split(","))
    include = (TILELANG_TEMPLATE_PATH, CUTLASS_INCLUDE_DIR)
    ptx = nvcc.compile_ptx(_UNUSED.sub("", source), include)
    return Program(parse(ptx, symbol, int(threads))), names
