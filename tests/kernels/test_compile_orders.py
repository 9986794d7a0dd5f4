"""Kernels that another process compiles are there when this one needs them; no GPU is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from kernel_orders import broken, meta, small_order
from launch_keys import Cached, Driver
from triton import knobs
from triton.runtime import driver

from vllm_sm12x import lowering
from vllm_sm12x.ops import compile_orders
from vllm_sm12x.ops.compile_orders import Order, take_orders
from vllm_sm12x.ops.fp8_einsum import warm_up as einsum_warm_up
from vllm_sm12x.ops.launching import compile_only
from vllm_sm12x.ops.mhc import warm_up as mhc_warm_up
from vllm_sm12x.ops.sparse_mla import warm_up as sparse_mla_warm_up

KERNELS = Path(compile_orders.__file__).resolve().parents[2]


def make_calls(capability: tuple[int, int]) -> Callable[[], None]:
    """Warm-ups with Triton's kernels and, of attention, Gluon's."""

    def make() -> None:
        head = meta(4, 4 * 512), meta(1), meta(4)
        mhc_warm_up.warm_up_head(64, *head, capability)
        weight, scale = meta(2 * 1024, 4096, dtype=torch.float8_e4m3fn), meta(2 * 8, 32)
        einsum_warm_up.warm_up(16, 2, weight, scale, capability)
        sparse_mla_warm_up.warm_up_prefill(16, meta(16), 640)

    return make


@pytest.fixture(params=[(12, 0), (12, 1), (9, 0)], ids=lambda pair: f"{pair[0]}.{pair[1]}")
def capability(request, tmp_path, monkeypatch):
    """A GPU that does not exist, and an empty cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    lowering.clear_cache()
    with (
        patch.object(driver, "_active", Driver(request.param)),
        patch.object(lowering, "_current_capability", Cached(request.param)),
    ):
        yield request.param
    lowering.clear_cache()


def work_off(folder: Path, processes: int = 1) -> None:
    environment = os.environ | {"PYTHONPATH": str(KERNELS), "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "vllm_sm12x.ops.compile_orders", str(folder)]
    started = [subprocess.Popen(words, env=environment) for _ in range(processes)]
    assert [process.wait() for process in started] == [0] * processes


@pytest.mark.slow
def test_what_another_process_compiles_is_found(capability, tmp_path):
    make = make_calls(capability)
    orders = take_orders(make, capability)
    names = {order.name for order in orders}
    assert {"einsum_kernel", "prefill_kernel"} < names and len(orders) > 3
    assert not any(order.is_compiled() for order in orders)
    compile_orders.write(tmp_path, orders)
    work_off(tmp_path, processes=2)
    assert list(compile_orders.results(tmp_path)) == [(order.name, "") for order in orders]
    assert all(order.is_compiled() for order in orders)

    found = []

    def listen(cache_hit: bool, **_: object) -> None:
        found.append(cache_hit)

    with knobs.compilation.scope(), compile_only(capability) as compilation:
        knobs.compilation.listener = listen
        make()
    assert found == [True] * len(orders)
    assert len({id(kernel) for kernel in compilation.kernels}) == len(orders)


@pytest.fixture
def one(tmp_path, monkeypatch) -> Order:
    """An order that an empty cache has not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return small_order()


def test_a_failure_is_told_and_the_others_are_compiled(one, tmp_path):
    compile_orders.write(tmp_path, [broken(one), one])
    work_off(tmp_path)
    (_, why), (name, nothing) = compile_orders.results(tmp_path)
    assert "fp7" in why
    assert (name, nothing) == (one.name, "")
    assert one.is_compiled()


def test_orders_that_are_taken_are_left(one, tmp_path):
    compile_orders.write(tmp_path, [one])
    (tmp_path / "0.taken").touch()
    work_off(tmp_path)
    assert not list(compile_orders.results(tmp_path)) and not one.is_compiled()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("vllm_sm12x.opsx", "kernel"),
        ("vllm_sm12x.ops.mhc.warm_up", "warm_up_head"),
        ("vllm_sm12x.ops.mhc.warm_up", "missing"),
    ],
)
def test_only_kernels_of_the_package_are_compiled(one, module, name):
    order = replace(one, module=module, name=name)
    with pytest.raises(
        ValueError, match=rf"{module}\.{name}, allowed: a kernel of vllm_sm12x\.ops"
    ):
        order.compile()
