"""What DeepSeek V4 does otherwise when it drafts with its MTP layer on the portable path.

Three things, each called from one place in vLLM: full decode graphs are not captured before they
are proven, warm-up runs take few requests, and the prefix cache keeps what a drafting lookup needs.
Where no operation is portable, and for other models and draft methods, vLLM does what it did.

The environment variable ``SM12X_MTP_FULL_GRAPHS`` says whether decode steps are captured as full
CUDA graphs: ``auto`` (the default; when every portable operation is in :data:`GRAPH_SAFE` and as
many tokens are drafted as :data:`GRAPH_SAFE_DRAFTS` names), ``never`` or ``always``. Without full
graphs decode runs on the piecewise ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config import CUDAGraphMode
from vllm.logger import init_logger

from vllm_sm12x import settings
from vllm_sm12x.dispatch import OPERATIONS, portable_operations

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu_worker import Worker

ENV = "SM12X_MTP_FULL_GRAPHS"

# The setting of this process.
setting = settings.Choice(ENV, ("auto", "never", "always"))

# Operations that declare themselves safe in a full decode graph with MTP: replayed over padded
# batches, full and piecewise graphs gave identical tokens on a GPU (reports/drafting).
GRAPH_SAFE = frozenset(OPERATIONS)
# Drafted tokens a step with which that was seen.
GRAPH_SAFE_DRAFTS = frozenset({1, 2, 3})

# Requests of a warm-up run. Kernels are compiled for types and not for batch sizes, so that more
# requests compile nothing more; each costs memory and time at start.
WARM_UP_REQUESTS = 32

# vLLM's handlers stand on the logger "vllm", which "vllm_sm12x" does not belong to.
logger = init_logger("vllm.sm12x.mtp")


def is_deepseek_v4(vllm_config: VllmConfig) -> bool:
    """Whether the engine serves DeepSeek V4."""
    hf_config = getattr(vllm_config.model_config, "hf_config", None)
    return getattr(hf_config, "model_type", None) == "deepseek_v4"


def is_portable_deepseek_v4(vllm_config: VllmConfig) -> bool:
    """Whether the model is DeepSeek V4 and any of its operations takes the portable path."""
    return bool(portable_operations()) and is_deepseek_v4(vllm_config)


def is_deepseek_v4_mtp(vllm_config: VllmConfig) -> bool:
    """Whether the engine serves DeepSeek V4 and drafts with its MTP layer."""
    drafting = vllm_config.speculative_config
    return drafting is not None and drafting.method == "mtp" and is_deepseek_v4(vllm_config)


def skips_full_decode_graphs(vllm_config: VllmConfig, cudagraph_mode: CUDAGraphMode) -> bool:
    """Whether no full graph is captured of decode steps, which then run on piecewise graphs.

    Args:
        vllm_config: The engine's configuration.
        cudagraph_mode: The mode that vLLM resolved, with full graphs for decode. Where it has no
            piecewise graphs (``FULL_DECODE_ONLY``) there is nothing to fall back on: it is
            honoured, with a warning.
    """
    if not is_deepseek_v4_mtp(vllm_config) or setting() == "always":
        return False
    portable = portable_operations()
    unproven = sorted(portable - GRAPH_SAFE)
    drafted = vllm_config.speculative_config.num_speculative_tokens
    if setting() == "never":
        reason = f"{ENV}=never"
    elif unproven:
        reason = f"not shown to replay rightly with MTP: {', '.join(unproven)}"
    elif portable and drafted not in GRAPH_SAFE_DRAFTS:
        reason = f"not shown to replay rightly with {drafted} drafted tokens"
    else:
        return False

    if cudagraph_mode.mixed_mode() != CUDAGraphMode.PIECEWISE:
        logger.warning_once(
            "Full decode CUDA graphs are captured, because cudagraph_mode %s has no piecewise ones "
            "to take instead, although %s",
            cudagraph_mode.name,
            reason,
        )
        return False
    logger.info_once(
        "Decode runs on piecewise CUDA graphs, and full ones are not captured: %s", reason
    )
    return True


def cap_warm_up_rows(vllm_config: VllmConfig, hidden_states: torch.Tensor) -> torch.Tensor:
    """The rows of ``hidden_states`` that a warm-up of the sampler takes.

    Not for the profile run: what it allocates is what the engine reserves for serving.

    Args:
        vllm_config: The engine's configuration.
        hidden_states: ``[requests, hidden]``.

    Returns:
        At most the first :data:`WARM_UP_REQUESTS` rows, a view; or all.
    """
    if not (portable_operations() and is_deepseek_v4_mtp(vllm_config)):
        return hidden_states
    return hidden_states[:WARM_UP_REQUESTS]


def warm_up_uniform_decode(worker: Worker) -> None:
    """Run the batch that drafting makes once: as many tokens a request as are drafted, and one.

    The release runs no such batch before the graphs, and with eager execution or piecewise graphs
    none with attention at all, so that the first answers would compile. The batch has at most
    :data:`WARM_UP_REQUESTS` requests, and writes nothing to the KV cache.

    Args:
        worker: A GPU worker whose model and KV cache are there.
    """
    vllm_config = worker.vllm_config
    if not (portable_operations() and is_deepseek_v4_mtp(vllm_config)):
        return
    if getattr(worker, "use_v2_model_runner", False):
        return  # it warms itself up by whole steps

    runner = worker.model_runner
    query_len = runner.uniform_decode_query_len
    requests = min(
        worker.scheduler_config.max_num_seqs,
        worker.scheduler_config.max_num_batched_tokens // query_len,
        WARM_UP_REQUESTS,
    )
    if requests == 0:
        return
    logger.info_once("Warming up decode with %d requests of %d tokens", requests, query_len)
    runner._dummy_run(
        requests * query_len,
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        force_attention=True,
        uniform_decode=True,
        skip_eplb=True,
    )


def caches_blocks_for_drafting(kv_cache_config: KVCacheConfig) -> bool:
    """Whether window groups cache the blocks that a lookup with drafting needs.

    vLLM marks the group of the draft layer (``is_eagle_group``) for DeepSeek V4 alone.
    """
    return bool(portable_operations()) and any(
        group.is_eagle_group for group in kv_cache_config.kv_cache_groups
    )


def clear_cache() -> None:
    """Forget what was read, for tests that set the variable."""
    setting.cache_clear()
