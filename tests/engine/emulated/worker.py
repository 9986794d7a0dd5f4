"""vLLM's GPU worker and model runner, on the emulated GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment
from vllm.v1.worker.workspace import init_workspace_manager

DEVICE = torch.device("cpu")


class Runner(GPUModelRunner):
    """The model runner; what it asks of CUDA itself is answered by :mod:`.gpu`."""

    def _init_device_properties(self) -> None:
        pass


class EmulatedWorker(Worker):
    """The worker, whose tensors lie in the CPU's memory.

    It starts, profiles, warms up and runs steps as on a GPU. The KV cache has the size that
    ``kv_cache_memory_bytes`` says, as there is no GPU's memory to be measured.
    """

    def init_device(self) -> None:
        self.device = DEVICE
        init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, "gloo"
        )
        init_workspace_manager(DEVICE, 1)
        # What a start logs of the GPU's memory.
        self.init_snapshot = SimpleNamespace(free_memory=0)
        self.model_runner = Runner(self.vllm_config, DEVICE)

    def _scoped_allocator_max_split(self, max_split_size_mb: int) -> AbstractContextManager[None]:
        return nullcontext()
