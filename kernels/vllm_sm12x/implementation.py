"""Which form of an operation runs: our kernel, or the plain PyTorch reference that defines it.

On a CPU the reference runs. On a GPU the kernel runs once it has been shown right on one: the
operations in :data:`SHOWN`. The environment variable ``SM12X_KERNELS`` says otherwise, to try a
kernel or to find out whether one is at fault. Nothing falls back by itself: a shape without a
kernel is an error.

``cutedsl`` is another case: without our kernel, which is for the compressor of C128A alone, vLLM's
Triton kernel runs.
"""

from __future__ import annotations

import functools
import os
from typing import Literal, get_args

from vllm_sm12x import settings

ENV = "SM12X_KERNELS"

Implementation = Literal["reference", "triton"]

# Operations that have a kernel.
OPERATIONS = (
    "sparse_mla_decode",
    "sparse_mla_prefill",
    "mqa_logits",
    "paged_mqa_logits",
    "fp8_einsum",
    "mhc",
    "mxfp4_experts",
    "cutedsl",
)

# Those whose kernels have passed their tests against the reference on a GPU: an H200, in SM12x's
# lowering and in its own.
SHOWN: frozenset[str] = frozenset(OPERATIONS)

ALLOWED = (
    "auto (the default: kernels that were shown right on a GPU), all, none, or a comma-separated"
    f" list of {', '.join(OPERATIONS)}"
)


def parse_setting(value: str) -> frozenset[str]:
    """Operations whose kernel runs on a GPU under ``SM12X_KERNELS=value``. A list is exact.

    Raises:
        ValueError: It names something that is not an operation with a kernel.
    """
    chosen = settings.names(ENV, value, OPERATIONS, ALLOWED)
    return SHOWN if chosen is None else chosen


@functools.cache
def kernel_operations() -> frozenset[str]:
    """Operations whose kernel runs on a GPU. Read once a process."""
    return parse_setting(os.environ.get(ENV, "auto"))


def choose(operation: str, asked: Implementation | None, on_gpu: bool) -> Implementation:
    """The form that a call takes.

    Args:
        operation: One of :data:`OPERATIONS`.
        asked: What the caller wants; None for the process's choice.
        on_gpu: Whether the call's tensors are on a GPU.

    Raises:
        ValueError: ``asked`` is neither None nor the name of a form.
    """
    if asked is None:
        return "triton" if on_gpu and operation in kernel_operations() else "reference"
    if asked not in get_args(Implementation):
        allowed = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation: {asked!r}, allowed: {allowed}")
    return asked


def clear_cache() -> None:
    """Forget what was decided, for tests that set the variable."""
    kernel_operations.cache_clear()


# A bad value stops whatever imports this, before a model is loaded.
parse_setting(os.environ.get(ENV, "auto"))
