"""Compiles kernels in processes of their own while the engine starts.

vLLM loads the weights, then traces and compiles the model, ten seconds and more on one core.
Kernels are compiled meanwhile, beside it: orders are placed in a folder, processes work them off
into Triton's cache on disk (``ops.compile_orders``), and whoever needs a kernel finds it there.
Nobody waits for one that is not there yet: it is compiled where it is needed, as without all this.

A start that finds every kernel in the cache makes no process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from vllm.logger import init_logger

from vllm_sm12x.ops import compile_orders
from vllm_sm12x.ops.compile_orders import Order

# Each imports PyTorch, which takes some 400 MB and a few seconds.
MOST_PROCESSES = 8
# A kernel takes a second or two; a process that is not done then hangs.
PATIENCE_S = 120.0

# vLLM's handlers stand on the logger "vllm", which "vllm_sm12x" does not belong to.
logger = init_logger("vllm.sm12x.compile_ahead")


@dataclass
class Ahead:
    """Processes that compile, and the folder of their orders.

    Args:
        orders: What to compile; those that Triton's cache has already are left out.
        engines: That start on this machine and do the same; they share its cores.
        most: Processes.
    """

    orders: list[Order]
    engines: int = 1
    most: int = MOST_PROCESSES
    processes: list[subprocess.Popen] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._began = time.perf_counter()
        self.orders = [order for order in self.orders if not order.is_compiled()]
        if not self.orders:
            return
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-sm12x-orders-")
        compile_orders.write(Path(self._folder.name), self.orders)
        words = [sys.executable, "-m", compile_orders.__name__, self._folder.name]
        # They see no GPU, on which each would take memory.
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        for _ in range(min(self.most, _processes(self.engines), len(self.orders))):
            self.processes.append(
                subprocess.Popen(
                    words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
                )
            )

    def finish(self) -> None:
        """Wait for the processes and say what came of it: a line, and one for each failure."""
        if not self.processes:
            return
        until = time.monotonic() + PATIENCE_S
        for process in self.processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        results = list(compile_orders.results(Path(self._folder.name)))
        self._folder.cleanup()
        for name, why in results:
            if why:
                logger.warning("%s was not compiled ahead and is compiled here: %s", name, why)
        done = sum(not why for _, why in results)
        logger.info(
            "Compiled %d of %d kernels ahead, in %d processes; %.1f s since they began",
            done,
            len(self.orders),
            len(self.processes),
            time.perf_counter() - self._began,
        )
        failed = [process.returncode for process in self.processes if process.returncode]
        if failed:
            logger.warning(
                "%d of the processes that compile ahead ended with status %s; what they had left "
                "is compiled here",
                len(failed),
                ", ".join(map(str, sorted(set(failed)))),
            )


def _processes(engines: int) -> int:
    """As many as there are cores for each engine, but for the one that starts it."""
    return max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) // engines - 1))
