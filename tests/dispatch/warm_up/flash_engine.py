"""An engine of DeepSeek V4 Flash with MTP as far as warm-up sees it, without a GPU.

Model and draft model are vLLM's own, of Flash's width, built on the CPU with one layer of each kind
and few experts. The caches have the pages that vLLM gives them. Nothing of the model runs.

Importing this makes vLLM believe in a GPU of capability 12.0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from flash_config import write_config
from tests.checkpoint.loading import check_loading

check_loading.fake_platform((12, 0))

from vllm.platforms import current_platform  # noqa: E402

# What vLLM gives to torch.compile ends there with graphs, of which there are as many as on a GPU.
type(current_platform).simple_compile_backend = "eager"


RATIOS = (0, 4, 128)
MOST_TOKENS, MOST_REQUESTS, DRAFTED = 8192, 64, 2
MAX_MODEL_LEN = 131_072
EXPERTS = 16
# Of the cache's groups: compressed keys, the window, and the states of both compressors.
BLOCK_SIZES = (256, 64, 4, 8)
_PAGES = 10


@dataclass
class Engine:
    """One rank's model and draft model, and the worker that has them."""

    config: Any
    model: torch.nn.Module
    draft: torch.nn.Module

    @property
    def worker(self) -> SimpleNamespace:
        """What of a GPU worker the warm-up asks for, with vLLM's own block tables."""
        from vllm.v1.worker.block_table import MultiGroupBlockTable

        tables = MultiGroupBlockTable(
            MOST_REQUESTS,
            MAX_MODEL_LEN,
            MOST_TOKENS,
            False,
            torch.device("cpu"),
            block_sizes=list(BLOCK_SIZES),
            kernel_block_sizes=list(BLOCK_SIZES),
        )
        drafter = SimpleNamespace(
            model=self.draft, kv_cache_gid=1, block_size=64, max_model_len=MAX_MODEL_LEN
        )
        batch = SimpleNamespace(block_table=tables, vocab_size=129_280)
        return SimpleNamespace(
            vllm_config=self.config,
            get_model=lambda: self.model,
            model_runner=SimpleNamespace(drafter=drafter, input_batch=batch),
        )

    def modules(self, kind: str) -> list[torch.nn.Module]:
        """The modules of a class, the draft model's last."""
        every = [*self.model.modules(), *self.draft.modules()]
        found = [module for module in every if type(module).__name__ == kind]
        assert found, f"no {kind} in the model"
        return found


def start(folder: Path, tp: int) -> Engine:
    """Rank 0 of ``tp``."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    write_config(folder, RATIOS)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content |= {"n_routed_experts": EXPERTS, "vocab_size": 1024}
    content |= {"max_position_embeddings": MAX_MODEL_LEN}
    path.write_text(json.dumps(content))
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        kv_cache_dtype="fp8",
        block_size=256,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=MOST_TOKENS,
        max_num_seqs=MOST_REQUESTS,
        enforce_eager=True,
        speculative_config={"method": "mtp", "num_speculative_tokens": DRAFTED},
    ).create_engine_config()
    config.parallel_config.tensor_parallel_size = tp
    check_loading.be_rank(tp, 0)
    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config):
        engine = Engine(
            config,
            _built(config, config.model_config),
            _built(config, config.speculative_config.draft_model_config),
        )
        give_caches(config)
    return engine


def _built(config: Any, model_config: Any) -> torch.nn.Module:
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(model_config.dtype):
        model = initialize_model(vllm_config=config, model_config=model_config)
    for module in model.modules():
        if type(module).__name__ == "FusedMoE":
            module.quant_method.process_weights_after_loading(module)
    return model


def give_caches(config: Any) -> None:
    """Caches with the pages' sizes and distances that the layers' specs name, without memory."""
    for layer in config.compilation_config.static_forward_context.values():
        spec = layer.get_kv_cache_spec(config) if hasattr(layer, "get_kv_cache_spec") else None
        if spec is None:
            continue
        rows = getattr(spec, "storage_block_size", spec.block_size)
        _, _, width = layer.get_attn_backend().get_kv_cache_shape(
            _PAGES, rows, 1, spec.head_size, cache_dtype_str=config.cache_config.cache_dtype
        )
        page = spec.page_size_bytes // spec.dtype.itemsize
        memory = torch.empty(_PAGES * page, dtype=spec.dtype, device="meta")
        layer.kv_cache = memory.as_strided((_PAGES, rows, width), (page, width, 1))
