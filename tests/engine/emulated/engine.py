"""Starts vLLM on the emulated GPU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from environment import ENGINE
from tests.engine.emulated import gpu, graphs

if TYPE_CHECKING:
    from emulator.driver import EmulatedDriver
    from vllm import LLM

# Of the engine's options, those that no run changes.
OPTIONS: dict[str, Any] = {
    "worker_cls": "tests.engine.emulated.worker.EmulatedWorker",
    "kv_cache_dtype": "fp8",
    "block_size": 256,
    "kv_cache_memory_bytes": 256 << 20,
    "seed": 0,
    "distributed_executor_backend": "mp",
    "disable_custom_all_reduce": True,
}

# And of those that score a checkpoint's forced tokens, as `score_checkpoint.py` does on a GPU.
SCORING: dict[str, Any] = {
    "tokenizer_mode": "deepseek_v4",
    "enable_prefix_caching": False,
    "enforce_eager": True,
    "logits_processors": ["tests.engine.forced_tokens:ForcedTokens"],
    # The processor counts the tokens that came out so far.
    "async_scheduling": False,
}


def prepare() -> None:
    """Put the emulated GPU in place, where it is not, and import vLLM.

    Raises:
        RuntimeError: This process has imported vLLM already, with another GPU or none.
    """
    if gpu.installed():
        return
    os.environ.update(ENGINE)
    # vLLM turns Triton off where it sees no driver, unless no GPU is to be seen.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # One process: what is put in place must be where the model runs.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Ranks are forked, with what is in place.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    gpu.install()
    import vllm.v1.engine.llm_engine  # noqa: F401

    import made_weights  # noqa: F401  registers its loader


@contextmanager
def emulated_engine(kernels: str = "none", **options: Any) -> Iterator[tuple[LLM, EmulatedDriver]]:
    """An engine with the portable path, as vLLM chooses it on this GPU, and what was launched.

    One in a process.

    Args:
        kernels: As ``SM12X_KERNELS``: ``all`` runs our kernels, which takes minutes for a few
            hundred tokens; ``none`` the same operations in PyTorch.
        options: Of ``vllm.LLM``, besides :data:`OPTIONS`.

    Raises:
        ValueError: ``kernels`` is something else.
        RuntimeError: As of :func:`prepare`.
    """
    if kernels not in ("all", "none"):
        raise ValueError(f"kernels: {kernels!r}, allowed: all, none")
    os.environ["SM12X_KERNELS"] = kernels
    prepare()
    from emulated_gpu import emulated_gpu
    from emulator.driver import allocation_of
    from vllm import LLM

    with emulated_gpu(gpu.CAPABILITY, every_kernel=kernels == "all", span=allocation_of) as driver:
        driver.perform = graphs.record
        options = OPTIONS | options
        if options.get("tensor_parallel_size", 1) == 1:
            options["distributed_executor_backend"] = "uni"
        yield LLM(**options), driver


def print_launches(driver: EmulatedDriver) -> None:
    """How often each kernel was launched, in this process."""
    for kernel, count in Counter(one.kernel for one in driver.launched).most_common():
        print(f"{count:6} {kernel}")
