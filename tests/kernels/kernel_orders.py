"""Orders of kernels to compile, for tests: one that takes little time, and what no order may be."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest.mock import patch

import torch
from launch_keys import Driver
from triton.runtime import driver

from vllm_sm12x.ops.compile_orders import Order, take_orders
from vllm_sm12x.ops.mhc.warm_up import warm_up_head


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def small_order() -> Order:
    """An order that takes little time, for a GPU that is not there."""
    with patch.object(driver, "_active", Driver((12, 0))):
        return take_orders(
            lambda: warm_up_head(1, meta(4, 2048), meta(1), meta(4), (12, 0)), (12, 0)
        )[0]


def broken(order: Order) -> Order:
    """The same kernel, for an argument of a type that there is not: ``fp7``."""
    said = json.loads(order.specialization)
    name = next(name for name, kind in said["signature"].items() if kind.startswith("*"))
    said["signature"][name] = "*fp7"
    return replace(order, specialization=json.dumps(said))
