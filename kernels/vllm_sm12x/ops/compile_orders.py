"""Kernels that other processes compile into Triton's cache on disk, where this one then finds them.

Most of what Triton does to compile holds Python's lock, so that threads gain little. An
:class:`Order` says all that a process needs to compile one kernel as this process would; the cache
has it under the same key then. Processes share a folder of orders and take one after the other:

    python -m vllm_sm12x.ops.compile_orders FOLDER

They need no GPU and see none. Only kernels of ``vllm_sm12x.ops`` and :data:`OTHERS` can be ordered:
whoever compiles imports the module of the kernel.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from triton import compile as triton_compile
from triton import knobs
from triton import language as tl
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.jit import JITFunction, convert_to_tuple_if_list

from vllm_sm12x.ops.launching import compile_only

PACKAGE = __package__
# Of vLLM's modules with kernels, those that are imported in about the time of Triton itself. Others
# import most of vLLM, which takes a process longer than their kernels take to compile.
OTHERS = frozenset({"vllm.v1.sample.ops.topk_topp_triton"})
ORDERS = "orders.json"


@dataclass(frozen=True)
class Order:
    """One kernel to compile.

    Attributes:
        module: Where it is defined: below ``vllm_sm12x.ops``, or one of :data:`OTHERS`.
        name: Its name there.
        target: Backend, architecture and warp size of the GPU, as Triton's ``GPUTarget``.
        specialization: Types, constants, attributes and launch options, as Triton serializes them.
    """

    module: str
    name: str
    target: tuple[str, int, int]
    specialization: str

    def compile(self) -> None:
        """Compile it, unless Triton's cache has it.

        Raises:
            ValueError: It is no kernel that can be ordered; module and name are in the message.
            Exception: What Triton raises, of a kernel that does not compile.
        """
        source, options = self._parsed()
        triton_compile(source, target=GPUTarget(*self.target), options=options.__dict__)

    def is_compiled(self) -> bool:
        """Whether Triton's cache on disk has it."""
        source, options = self._parsed()
        backend = make_backend(GPUTarget(*self.target))
        environment = get_cache_invalidating_env_vars()
        key = get_cache_key(source, backend, options, env_vars=environment)
        cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        return bool(cache.get_group(f"{source.name[:150]}.json"))

    def _parsed(self) -> tuple[ASTSource, Any]:
        """What Triton compiles, and with which options; as its ``JITFunction.preload`` reads it."""
        kernel = self._kernel()
        said = json.loads(self.specialization)
        constants = {
            tuple(key): _constant(value)
            for key, value in zip(said["constant_keys"], said["constant_vals"], strict=True)
        }
        attributes = {
            tuple(key): value
            for key, value in zip(said["attrs_keys"], said["attrs_vals"], strict=True)
        }
        signature = {
            name: convert_to_tuple_if_list(kind) for name, kind in said["signature"].items()
        }
        kind = GluonASTSource if kernel.is_gluon() else ASTSource
        source = kind(kernel, signature, constants, attributes)
        options = {name: convert_to_tuple_if_list(value) for name, value in said["options"].items()}
        return source, make_backend(GPUTarget(*self.target)).parse_options(options)

    def _kernel(self) -> JITFunction:
        if _can_be_ordered(self.module):
            kernel = getattr(import_module(self.module), self.name, None)
            if isinstance(kernel, JITFunction):
                return kernel
        allowed = ", ".join((PACKAGE, *sorted(OTHERS)))
        raise ValueError(f"{self.module}.{self.name}, allowed: a kernel of {allowed}")


def take_orders(make_calls: Callable[[], None], capability: tuple[int, int]) -> list[Order]:
    """Orders of the kernels that calls would compile, of those that can be ordered.

    Nothing is compiled or launched.

    Args:
        make_calls: Calls operations on tensors of the ``meta`` device.
        capability: Of the GPU at hand.
    """
    orders: dict[Order, None] = {}

    def note(**event: Any) -> bool:
        function, compilation = event["fn"], event["compile"]
        if _can_be_ordered(function.module):
            target = function.jit_function.device_caches[compilation["device"]][2]
            orders[
                Order(
                    function.module,
                    function.name,
                    (target.backend, target.arch, target.warp_size),
                    compilation["specialization_data"],
                )
            ] = None
        return True  # Triton takes it as: someone else compiles this

    with knobs.runtime.scope(), compile_only(capability):
        knobs.runtime.jit_cache_hook = note
        make_calls()
    return list(orders)


def write(folder: Path, orders: list[Order]) -> None:
    """Put orders into a folder, for :func:`work_off` to read."""
    text = json.dumps([asdict(order) for order in orders])
    (folder / ORDERS).write_text(text, encoding="utf-8")


def results(folder: Path) -> Iterator[tuple[str, str]]:
    """Of each order that was worked off, the kernel's name, and why it failed or nothing."""
    for place, order in enumerate(json.loads((folder / ORDERS).read_text(encoding="utf-8"))):
        result = folder / f"{place}.result"
        if result.is_file():
            yield order["name"], result.read_text(encoding="utf-8")


def work_off(folder: Path) -> None:
    """Compile the orders of a folder that no other process has taken, until none is left."""
    for place, said in enumerate(json.loads((folder / ORDERS).read_text(encoding="utf-8"))):
        try:
            (folder / f"{place}.taken").touch(exist_ok=False)
        except FileExistsError:
            continue
        why = ""
        try:
            Order(**said | {"target": tuple(said["target"])}).compile()
        except (
            Exception
        ) as error:  # whatever it is, the other orders stand, and who ordered is told
            why = f"{type(error).__name__}: {error}"
        (folder / f"{place}.result").write_text(why, encoding="utf-8")


def _can_be_ordered(module: str) -> bool:
    return module.startswith(f"{PACKAGE}.") or module in OTHERS


def _constant(value: Any) -> Any:
    if tl.dtype.is_dtype(value):
        return tl.dtype(value)
    if isinstance(value, dict) and "constexpr" in value:
        return tl.constexpr(value["constexpr"])
    return convert_to_tuple_if_list(value) if isinstance(value, list) else value


if __name__ == "__main__":
    work_off(Path(sys.argv[1]))
