"""Compiles what a request can make DeepSeek V4 launch, before the first request comes.

Our kernels take their launch parameters from tables, by the shape and the number of tokens of a
call, and each row is another compilation. vLLM's own runs before serving reach some rows. Here the
model says which shapes its layers have, and each operation compiles all rows that these can take.
Nothing of that is launched, and it takes no memory of the GPU but for the machine code.

On a machine's first rank they are ordered as soon as the weights are there, and compiled beside
what vLLM then does (``compile_ahead``): little is left here in a start with empty caches. So is
upstream's kernel of top-k and top-p, before the weights are loaded: its six forms take half a
minute on one core, a form up to 14 s.

Upstream's Triton kernels around them have one form each, which a run of a small batch reaches, but
for one that is compiled for every power of two of requests. Those of the model runner and the
drafter are in ``warm_up_runner``, those of sampling in ``warm_up_sampling``.

Inert where no operation is on the portable path, and for other models.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger

from vllm_sm12x.adapters.mtp import is_portable_deepseek_v4
from vllm_sm12x.adapters.warm_up_runner import add_runner
from vllm_sm12x.adapters.warm_up_sampling import (
    add_likely,
    add_sampling,
    call_compiled_functions,
)
from vllm_sm12x.dispatch import portable_operations
from vllm_sm12x.implementation import kernel_operations

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_sm12x.adapters.compile_ahead import Ahead
    from vllm_sm12x.ops.compile_orders import Order

# Compilations beside each other. A part of each holds Python's lock, so that more gain little.
MOST_THREADS = 8

# Half of them decode, the others are a prompt: more than a draft's tokens.
MIXED_TOKENS = 16

# Of top-k and top-p two forms take half of the time: more processes gain nothing.
SAMPLING_PROCESSES = 3

# vLLM's handlers stand on the logger "vllm", which "vllm_sm12x" does not belong to.
logger = init_logger("vllm.sm12x.warm_up")

# Processes that compile ahead, from the first seams to the last.
_ahead: list[Ahead] = []


@dataclass(frozen=True)
class Limits:
    """What the engine bounds a step by.

    Attributes:
        tokens: Of a step.
        decode_tokens: Of a step's decoding requests, with padding.
        expert_tokens: That a layer's experts see: those of all data-parallel ranks.
    """

    tokens: int
    decode_tokens: int
    expert_tokens: int


@dataclass
class Calls:
    """Warm-up functions with their arguments; of calls that compile the same, one."""

    operations: frozenset[str]
    capability: tuple[int, int]
    by_key: dict[tuple[object, ...], Callable[[], None]] = field(default_factory=dict)

    def add(self, operation: str, function: Callable[..., None], *arguments: object) -> None:
        """Add a call, unless the operation runs no kernel of ours here."""
        if operation in self.operations:
            self.add_always(function, *arguments)

    def add_always(self, function: Callable[..., None], *arguments: object) -> None:
        """Add a call."""
        key = (function, *map(_describe, arguments))
        self.by_key.setdefault(key, lambda: function(*arguments))

    def make(self) -> None:
        """Make every call, where nothing is launched."""
        for call in self.by_key.values():
            call()


def compile_sampling_ahead(worker: Worker) -> None:
    """Have processes compile the long kernels of sampling; :func:`warm_up_kernels` ends that.

    Args:
        worker: A GPU worker whose device is there, and whose model need not be.
    """
    if not _compiles_ahead(worker) or getattr(worker, "use_v2_model_runner", False):
        return
    from vllm_sm12x.ops.compile_orders import take_orders

    capability = torch.cuda.get_device_capability()
    calls = Calls(frozenset(), capability)
    add_likely(calls, worker)
    _order(worker, take_orders(calls.make, capability), most=SAMPLING_PROCESSES)


def compile_ahead(worker: Worker) -> None:
    """Have processes compile our kernels from now on; :func:`warm_up_kernels` ends that.

    Args:
        worker: A GPU worker whose model is loaded, and whose KV cache need not be there.
    """
    if not _compiles_ahead(worker):
        return
    operations = portable_operations() & kernel_operations()
    _order(worker, orders_of(worker, operations, torch.cuda.get_device_capability()))


def warm_up_kernels(worker: Worker) -> None:
    """Compile and load the kernels; one line in the log says how many, and in what time.

    Args:
        worker: A GPU worker whose model is loaded and whose KV cache is there.
    """
    if not _applies(worker):
        return
    start = time.perf_counter()
    while _ahead:
        _ahead.pop().finish()
    operations = portable_operations() & kernel_operations()
    kernels = compile_kernels(calls_of(worker, operations, torch.cuda.get_device_capability()))
    load(kernels)
    if not getattr(worker, "use_v2_model_runner", False):
        call_compiled_functions(worker)
    logger.info(
        "Compiled and loaded %d Triton kernels in %.1f s, of %s",
        len(kernels),
        time.perf_counter() - start,
        ", ".join(sorted(operations)) or "no operation of vllm_sm12x",
    )


def warm_up_mixed_batch(worker: Worker) -> None:
    """Run a batch of requests that decode and one that is read, with attention, once.

    With eager execution or piecewise graphs, nothing before serving runs attention, and nothing
    ever reads a prompt. With eager execution one token follows: the embedding of more than one rank
    is given to ``torch.compile``, which compiles again for it. The runs write nothing to the KV
    cache.

    Args:
        worker: As of :func:`warm_up_kernels`.
    """
    if not _applies(worker) or getattr(worker, "use_v2_model_runner", False):
        return  # the second runner warms itself up by whole steps
    tokens = min(
        MIXED_TOKENS,
        worker.scheduler_config.max_num_batched_tokens,
        # The batch's prompt has one token before this step.
        worker.vllm_config.model_config.max_model_len - 1,
    )
    if tokens < 1:
        return
    worker.model_runner._dummy_run(
        tokens,
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        force_attention=True,
        create_mixed_batch=True,
        skip_eplb=True,
    )
    if worker.vllm_config.compilation_config.mode == CompilationMode.NONE:
        worker.model_runner._dummy_run(1, cudagraph_runtime_mode=CUDAGraphMode.NONE, skip_eplb=True)


def _compiles_ahead(worker: Worker) -> bool:
    """Of the ranks of a machine one does, for the cache is one."""
    return _applies(worker) and worker.local_rank == 0


def _order(worker: Worker, orders: list[Order], **limits: int) -> None:
    from vllm_sm12x.adapters.compile_ahead import Ahead

    # Each of the machine's data-parallel engines comes here.
    engines = worker.vllm_config.parallel_config.data_parallel_size_local
    _ahead.append(Ahead(orders, max(1, engines), **limits))


def _applies(worker: Worker) -> bool:
    return is_portable_deepseek_v4(worker.vllm_config) and torch.cuda.is_available()


def calls_of(worker: Worker, operations: frozenset[str], capability: tuple[int, int]) -> Calls:
    """The warm-up calls for the worker's model and its draft model.

    Args:
        worker: As of :func:`warm_up_kernels`.
        operations: Those whose kernels run.
        capability: Of the GPU.
    """
    calls = calls_of_operations(worker, operations, capability)
    scheduler = worker.vllm_config.scheduler_config
    window = worker.vllm_config.model_config.hf_config.sliding_window
    calls.add_always(_compile_prefill_metadata, scheduler.max_num_seqs, window)
    if not getattr(worker, "use_v2_model_runner", False):
        add_runner(calls, worker)
        add_sampling(calls, worker)
    return calls


def calls_of_operations(
    worker: Worker, operations: frozenset[str], capability: tuple[int, int]
) -> Calls:
    """Of :func:`calls_of`, those of our operations."""
    limits = limits_of(worker.vllm_config)
    calls = Calls(operations, capability)
    for model in _models(worker):
        for module in model.modules():
            for add in _ADD:
                add(calls, module, limits)
    return calls


def orders_of(
    worker: Worker, operations: frozenset[str], capability: tuple[int, int]
) -> list[Order]:
    """Orders of the kernels that the calls of our operations compile."""
    from vllm_sm12x.ops.compile_orders import take_orders

    with _caches_without_memory(worker.vllm_config):
        return take_orders(calls_of_operations(worker, operations, capability).make, capability)


@contextmanager
def _caches_without_memory(vllm_config: Any) -> Iterator[None]:
    """Give layers that have no KV cache yet one of its form, without memory, in the block.

    Pages that vLLM makes longer, so that groups share them, have other strides, but divisible by 16
    as these are; no kernel is compiled for more of them than that.
    """
    given = []
    for layer in vllm_config.compilation_config.static_forward_context.values():
        spec = layer.get_kv_cache_spec(vllm_config) if hasattr(layer, "get_kv_cache_spec") else None
        cache = getattr(layer, "kv_cache", None)
        if spec is None or not isinstance(cache, torch.Tensor) or cache.numel():
            continue
        rows = getattr(spec, "storage_block_size", spec.block_size)
        blocks, rows, width = layer.get_attn_backend().get_kv_cache_shape(
            2, rows, 1, spec.head_size, cache_dtype_str=vllm_config.cache_config.cache_dtype
        )
        page = spec.page_size_bytes // spec.dtype.itemsize
        memory = torch.empty(blocks * page, dtype=spec.dtype, device="meta")
        given.append((layer, cache))
        layer.kv_cache = memory.as_strided((blocks, rows, width), (page, width, 1))
    try:
        yield
    finally:
        for layer, cache in given:
            layer.kv_cache = cache


def limits_of(vllm_config: Any) -> Limits:
    """The bounds of the engine that ``vllm_config`` configures."""
    scheduler = vllm_config.scheduler_config
    tokens = scheduler.max_num_batched_tokens
    tokens_a_request = 1 + vllm_config.num_speculative_tokens
    # A full graph pads a batch to the sizes that are captured.
    captured = max(vllm_config.compilation_config.cudagraph_capture_sizes or [0])
    return Limits(
        tokens=tokens,
        decode_tokens=min(tokens, max(scheduler.max_num_seqs * tokens_a_request, captured)),
        expert_tokens=tokens * vllm_config.parallel_config.data_parallel_size,
    )


def compile_kernels(calls: Calls) -> list[CompiledKernel]:
    """Make the calls with nothing launched, and return each kernel that they compile once."""
    from triton import AsyncCompileMode

    from vllm_sm12x.ops.launching import compile_only

    with (
        ThreadPoolExecutor(_threads()) as pool,
        compile_only(calls.capability),
        AsyncCompileMode(pool),
    ):
        calls.make()
    # Once more: now the kernels are there, and Triton files each under all that calls can ask for.
    with compile_only(calls.capability) as compilation:
        calls.make()
    return list({id(kernel): kernel for kernel in compilation.kernels}.values())


def load(kernels: list[CompiledKernel]) -> None:
    """Do what else the first launch would: build the launchers, give the GPU the machine code."""
    for kernel in kernels:
        kernel.run  # noqa: B018 (reading the property does it)


def _threads() -> int:
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0))))


def _models(worker: Worker) -> Iterator[torch.nn.Module]:
    yield worker.get_model()
    draft = getattr(getattr(worker.model_runner, "drafter", None), "model", None)
    if isinstance(draft, torch.nn.Module):
        yield draft


def _compile_prefill_metadata(requests: int, window: int) -> None:
    """Upstream's kernel that has a form for every power of two of requests that are read."""
    from vllm.v1.attention.backends.mla.sparse_swa import _compute_prefill_metadata_kernel

    lens = torch.empty(1, dtype=torch.int32, device="meta")
    block = 1
    while block < 2 * requests:
        _compute_prefill_metadata_kernel[(1,)](
            lens,
            lens,
            lens,
            block,
            0,
            window,
            BLOCK_SIZE=block,
        )
        block *= 2


def _describe(argument: object) -> object:
    """What of an argument a launch can tell from another's."""
    if isinstance(argument, torch.Tensor):
        alignment = argument.data_ptr() % 16
        return argument.dtype, argument.shape, argument.stride(), alignment
    if isinstance(argument, tuple):
        return tuple(map(_describe, argument))
    return argument


def _add_attention(calls: Calls, module: torch.nn.Module, limits: Limits) -> None:
    from vllm.models.deepseek_v4.attention import DeepseekV4MLAAttention

    from vllm_sm12x.adapters.sparse_mla import most_compressed_keys, padded_width
    from vllm_sm12x.ops.sparse_mla import warm_up

    if not isinstance(module, DeepseekV4MLAAttention):
        return
    extra = most_compressed_keys(module)
    calls.add(
        "sparse_mla_decode",
        warm_up.warm_up_decode,
        limits.decode_tokens,
        module.padded_heads,
        module.attn_sink,
        module.swa_cache_layer.kv_cache,
        module.window_size,
        module.kv_cache if extra else None,
        extra,
    )
    calls.add(
        "sparse_mla_prefill",
        warm_up.warm_up_prefill,
        module.padded_heads,
        module.attn_sink,
        padded_width(module.window_size + extra),
    )


def _add_projection(calls: Calls, module: torch.nn.Module, limits: Limits) -> None:
    from vllm.models.deepseek_v4.attention import DeepseekV4MultiHeadLatentAttentionWrapper

    from vllm_sm12x.ops.fp8_einsum.warm_up import warm_up

    if isinstance(module, DeepseekV4MultiHeadLatentAttentionWrapper):
        calls.add(
            "fp8_einsum",
            warm_up,
            limits.tokens,
            module.n_local_groups,
            module.wo_a.weight,
            module.wo_a.weight_scale_inv,
            calls.capability,
        )


def _add_compressor(calls: Calls, module: torch.nn.Module, limits: Limits) -> None:
    from vllm.models.deepseek_v4.attention import DeepseekV4MultiHeadLatentAttentionWrapper

    from vllm_sm12x.adapters.compressor import has_kernel
    from vllm_sm12x.ops.compressor.warm_up import warm_up

    if not isinstance(module, DeepseekV4MultiHeadLatentAttentionWrapper):
        return
    compressor = module.compressor
    if compressor is None or not has_kernel(compressor.head_dim, compressor.compress_ratio):
        return
    calls.add(
        "cutedsl",
        warm_up,
        compressor.state_cache.kv_cache,
        compressor.norm.weight,
        module.rotary_emb.cos_sin_cache,
        module.mla_attn.kv_cache,
        compressor.compress_ratio,
        compressor.overlap,
    )


def _add_indexer(calls: Calls, module: torch.nn.Module, limits: Limits) -> None:
    from vllm.models.deepseek_v4.attention import DeepseekV4Indexer

    from vllm_sm12x.ops.mqa_logits.warm_up import warm_up as warm_up_prefill
    from vllm_sm12x.ops.paged_mqa_logits.warm_up import warm_up as warm_up_decode

    if not isinstance(module, DeepseekV4Indexer):
        return
    calls.add("mqa_logits", warm_up_prefill, module.n_head)
    calls.add(
        "paged_mqa_logits",
        warm_up_decode,
        limits.decode_tokens,
        module.n_head,
        module.k_cache.kv_cache.unsqueeze(-2),
        module.max_model_len,
        calls.capability,
    )


def _add_mhc(calls: Calls, module: torch.nn.Module, limits: Limits) -> None:
    from vllm.models.deepseek_v4.nvidia.model import DeepseekV4DecoderLayer

    from vllm_sm12x.ops.mhc import warm_up

    if isinstance(module, DeepseekV4DecoderLayer):
        for part in ("attn", "ffn"):
            calls.add(
                "mhc",
                warm_up.warm_up_layer,
                limits.tokens,
                *(getattr(module, f"hc_{part}_{name}") for name in ("fn", "scale", "base")),
                getattr(module, f"{part}_norm").weight,
                calls.capability,
            )
    # The model's and the draft layer's, under the same names.
    head = [getattr(module, f"hc_head_{name}", None) for name in ("fn", "scale", "base")]
    if all(isinstance(tensor, torch.Tensor) for tensor in head):
        calls.add("mhc", warm_up.warm_up_head, limits.tokens, *head, calls.capability)


def _add_experts(calls: Calls, module: torch.nn.Module, limits: Limits) -> None:
    from vllm.model_executor.layers.fused_moe.layer import FusedMoE

    from vllm_sm12x.adapters.mxfp4_experts import SM12xMxfp4Experts
    from vllm_sm12x.ops.mxfp4_experts.warm_up import warm_up

    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    if not (isinstance(module, FusedMoE) and isinstance(experts, SM12xMxfp4Experts)):
        return
    calls.add(
        "mxfp4_experts",
        warm_up,
        limits.expert_tokens,
        module.top_k,
        # The router's own choice, unless what prepares the experts' input asks for another.
        module.quant_method.topk_indices_dtype or torch.int32,
        (module.w13_weight, experts.w1_scale, module.w2_weight, experts.w2_scale),
        experts.quant_config.gemm1_clamp_limit,
        module.apply_router_weight_on_input,
        module.expert_map,
        experts.activations,
        calls.capability,
    )


# What each looks for in the model.
_ADD = (
    _add_attention,
    _add_projection,
    _add_compressor,
    _add_indexer,
    _add_mhc,
    _add_experts,
)
