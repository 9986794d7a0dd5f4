"""CUDA graphs of whole drafting passes with DeepSeek V4's MTP layer.

vLLM drafts on piecewise graphs: attention, with its linears and norms, is launched from Python
between them, in every pass. The draft layer has a window alone, so that its launches follow from
the numbers of requests and tokens, and all that it reads of a step lies where it lay in the step
before. A pass of requests that all decode can therefore be one graph, as the model's own step is.

A graph is captured for each number of requests, of a step's first pass, which takes as many tokens
a request as the step verifies, and of the others, which take one. It is replayed where a pass has
the same numbers and finds everything where it was captured; all other passes run as before.

The environment variable ``SM12X_DRAFT_GRAPHS`` says whether they are captured: ``auto`` (the
default; when as many tokens are drafted as :data:`SHOWN_DRAFTS` names), ``never`` or ``always``.
They come with full decode graphs and not without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import CUDAGraphMode
from vllm.forward_context import (
    BatchDescriptor,
    get_forward_context,
    override_forward_context,
    set_forward_context,
)
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID

from vllm_sm12x import settings
from vllm_sm12x.adapters.mtp import is_deepseek_v4_mtp, skips_full_decode_graphs
from vllm_sm12x.dispatch import portable_enabled

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

# The setting of this process.
setting = settings.Choice("SM12X_DRAFT_GRAPHS", ("auto", "never", "always"))

# Drafted tokens a step with which a GPU gave the same tokens as without these graphs
# (reports/drafting).
SHOWN_DRAFTS = frozenset({1, 2, 3})

# Two graphs for each number of requests up to this.
MOST_REQUESTS = 32

# vLLM's handlers stand on the logger "vllm", which "vllm_sm12x" does not belong to.
logger = init_logger("vllm.sm12x.draft_graphs")

# What tells a pass from others: its graph's descriptor, and where all that it reads lies.
Key = tuple[Any, ...]


class DraftGraphs:
    """Stands for the draft model: replays a captured pass, and runs the model for all others.

    What it does not have itself, ``compute_logits`` for one, is the model's.

    Attributes:
        model: The draft model.
        replayed: Passes that were replayed.
    """

    def __init__(self, model: Any, vllm_config: VllmConfig) -> None:
        self.model = model
        self.replayed = 0
        self._graphs = CUDAGraphWrapper(model, vllm_config, CUDAGraphMode.FULL)
        self._captured: set[Key] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def __len__(self) -> int:
        return len(self._captured)

    def __call__(self, **inputs: torch.Tensor | None) -> torch.Tensor:
        """A pass, inside vLLM's forward context, with the inputs of the model by name."""
        context = get_forward_context()
        key = _key(context, inputs)
        # vLLM can clear all graphs.
        if key not in self._captured or key[0] not in self._graphs.concrete_cudagraph_entries:
            return self.model(**inputs)
        self.replayed += 1
        with _as(context, CUDAGraphMode.FULL, key[0]):
            return self._graphs(**inputs)

    def capture(self, **inputs: torch.Tensor | None) -> None:
        """Capture a pass, inside the forward context that its like will have.

        Raises:
            ValueError: The pass has other attention than of a window, or reads a prompt.
        """
        context = get_forward_context()
        key = _key(context, inputs)
        if key is None:
            raise ValueError("attn_metadata: a pass of this kind is allowed in no graph")
        with _as(context, CUDAGraphMode.NONE, key[0]):
            # What is loaded, or allocated once, at a first run may not be in a capture.
            self.model(**inputs)
        with _as(context, CUDAGraphMode.FULL, key[0]):
            self._graphs(**inputs)
        self._captured.add(key)


@torch.inference_mode()
def capture_draft_graphs(runner: GPUModelRunner) -> None:
    """Capture the passes of up to :data:`MOST_REQUESTS` requests, and replay them from now on.

    Called while vLLM captures its own graphs. Writes nothing to the KV cache.
    """
    if not _applies(runner):
        return
    drafter = runner.drafter
    model = drafter.model.model if isinstance(drafter.model, DraftGraphs) else drafter.model
    graphs = DraftGraphs(model, runner.vllm_config)
    verified = 1 + drafter.num_speculative_tokens
    most = min(
        runner.scheduler_config.max_num_seqs,
        runner.max_num_tokens // verified,
        runner.compilation_config.max_cudagraph_capture_size // verified,
        MOST_REQUESTS,
    )
    # From large to small: the memory of one serves the next.
    for requests in range(most, 0, -1):
        # With one draft there is no pass after the first.
        for query_len in (verified, 1) if verified > 2 else (verified,):
            with _pass(runner, requests, query_len) as inputs:
                graphs.capture(**inputs)
    drafter.model = graphs
    logger.info_once(
        "Captured %d CUDA graphs of whole drafting passes, of up to %d requests", len(graphs), most
    )


def _applies(runner: GPUModelRunner) -> bool:
    vllm_config = runner.vllm_config
    drafting = vllm_config.speculative_config
    if not (portable_enabled("sparse_mla_decode") and is_deepseek_v4_mtp(vllm_config)):
        return False
    if setting() == "never" or drafting.enforce_eager or not hasattr(runner, "drafter"):
        return False
    if setting() == "auto" and drafting.num_speculative_tokens not in SHOWN_DRAFTS:
        return False
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode.decode_mode() != CUDAGraphMode.FULL or skips_full_decode_graphs(vllm_config, mode):
        return False
    # Ranks that share experts agree on a step's numbers from Python; adapters change the model.
    return vllm_config.parallel_config.data_parallel_size == 1 and vllm_config.lora_config is None


@contextmanager
def _pass(
    runner: GPUModelRunner, requests: int, query_len: int
) -> Iterator[dict[str, torch.Tensor | None]]:
    """The forward context of a pass, and the model's inputs, as ``propose`` makes them.

    Args:
        requests: That decode.
        query_len: Tokens of each: 1, or in the first pass as many as the step verifies.
    """
    drafter = runner.drafter
    first = query_len > 1
    tokens = requests * query_len
    table = runner.input_batch.block_table[drafter.kv_cache_gid]
    slots = table.slot_mapping.gpu if first else drafter._slot_mapping_buffer
    # Tokens that have no place in the cache: none is written, and none is attended to.
    slots[:tokens].fill_(PADDING_SLOT_ID)
    starts = torch.arange(0, tokens + 1, query_len, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(runner.device),
        query_start_loc_cpu=starts,
        seq_lens=torch.full((requests,), query_len, dtype=torch.int32, device=runner.device),
        num_reqs=requests,
        num_actual_tokens=tokens,
        max_query_len=query_len,
        max_seq_len=query_len,
        block_table_tensor=table.get_device_tensor(requests),
        slot_mapping=slots[:tokens],
    )
    _, metadata = drafter.build_per_group_and_layer_attn_metadata(
        common, draft_index=0 if first else 1
    )
    _, padded, _ = drafter._determine_batch_execution_and_padding(tokens)
    inputs, _ = drafter.build_model_inputs_first_pass(tokens, padded, None)
    with set_forward_context(
        metadata,
        runner.vllm_config,
        num_tokens=padded,
        slot_mapping=drafter._get_slot_mapping(padded),
    ):
        yield inputs


def _as(
    context: ForwardContext, mode: CUDAGraphMode, descriptor: BatchDescriptor
) -> AbstractContextManager[None]:
    """The forward context as of a graph, for the time being."""
    return override_forward_context(
        replace(context, cudagraph_runtime_mode=mode, batch_descriptor=descriptor)
    )


def _key(context: ForwardContext, inputs: dict[str, torch.Tensor | None]) -> Key | None:
    """The graph's numbers, and where a pass finds what it reads; None for a pass of no graph."""
    # Here, so that no other model's start imports it.
    from vllm.v1.attention.backends.mla.sparse_swa import DeepseekSparseSWAMetadata

    if not isinstance(context.attn_metadata, dict) or not context.attn_metadata:
        return None
    places: list[int | None] = []
    for metadata in {id(one): one for one in context.attn_metadata.values()}.values():
        if not isinstance(metadata, DeepseekSparseSWAMetadata) or metadata.num_prefills:
            return None
        requests, tokens = metadata.num_decodes, metadata.num_decode_tokens
        slots = metadata.slot_mapping
        read = (slots, metadata.decode_swa_indices, metadata.decode_swa_lens)
        places += [requests, tokens, len(slots), *map(torch.Tensor.data_ptr, read)]
    for tensor in inputs.values():
        places += [None, 0] if tensor is None else [tensor.data_ptr(), len(tensor)]
    # Padded, both passes of a request can have as many tokens; as vLLM has it, a batch is uniform
    # where each request has as many tokens as a step verifies.
    descriptor = BatchDescriptor(
        num_tokens=len(inputs["positions"]), num_reqs=requests, uniform=tokens > requests
    )
    return descriptor, *places
