"""Which kernels a call would make Triton compile, found out without a GPU and without compiling.

Triton keeps a compiled kernel under a key: the types of the arguments, which of them are 1, which
are divisible by 16, the values of constexprs, the launch options. A launch whose key is not there
compiles. Here Triton sees a GPU that does not exist, makes the key of every launch and of every
kernel that is only to be compiled, and goes no further.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vllm_sm12x import lowering
from vllm_sm12x.ops.launching import compile_only

_devices = itertools.count(1000)


@dataclass(frozen=True)
class Driver:
    """What the making of a key asks of a GPU. Each is another device, with no kernels yet."""

    capability: tuple[int, int]
    device: int = field(default_factory=lambda: next(_devices))

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)


@dataclass
class Keys:
    """Kernels by name and key; each with a description for people."""

    found: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def kernels(self) -> set[str]:
        """Names of the kernels."""
        return {name.rpartition(".")[2] for name, _ in self.found}

    def missing_from(self, others: Keys) -> list[str]:
        """Descriptions of what is here and not in ``others``."""
        return [text for key, text in self.found.items() if key not in others.found]

    def _add(self, **event: object) -> bool:
        function, compiled = event["fn"], event["compile"]
        names = function.jit_function.arg_names
        constants = {names[place[0]]: value for place, value in compiled["constants"].items()}
        (attributes,) = compiled["configs"]
        divisible = [names[place[0]] for place, found in attributes.items() if found]
        types = {name: kind for name, kind in compiled["signature"].items() if kind != "constexpr"}
        self.found.setdefault(
            (f"{function.module}.{function.name}", event["key"]),
            f"{function.name}: constexpr {constants}, divisible by 16 {divisible}, types {types},"
            f" num_warps={compiled['num_warps']}, num_stages={compiled['num_stages']}",
        )
        return True  # Triton takes it as: someone else compiles this


@contextmanager
def recorded(capability: tuple[int, int]) -> Iterator[Keys]:
    """Record what is launched or compiled on a GPU of this capability; nothing is."""
    keys = Keys()
    lowering.clear_cache()
    with (
        patch.object(driver, "_active", Driver(capability)),
        patch.object(lowering, "_current_capability", Cached(capability)),
        knobs.runtime.scope(),
        compile_only(capability),
    ):
        knobs.runtime.jit_cache_hook = keys._add
        yield keys
    lowering.clear_cache()


class Cached:
    """A function of no arguments that gives one value, with a cache to clear."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __call__(self) -> object:
        return self.value

    def cache_clear(self) -> None:
        pass
