"""Compiles the Triton kernels of vLLM's model runner and drafter.

They take numbers of tokens or requests, and Triton compiles a form for 1, one for multiples of 16
and one for all others. No run before serving launches them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from vllm_sm12x.ops.launching import one_of_each, stand_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.worker.gpu_worker import Worker


class Calls(Protocol):
    """What collects calls; see :class:`vllm_sm12x.adapters.warm_up.Calls`."""

    def add_always(self, function: Callable[..., None], *arguments: object) -> None:
        """Add a call."""
        ...


def add_runner(calls: Calls, worker: Worker) -> None:
    """Add the calls of every step, and with MTP those of drafting.

    Args:
        calls: They are added to it.
        worker: A GPU worker with vLLM's first model runner, whose KV cache is there.
    """
    runner, scheduler = worker.model_runner, worker.vllm_config.scheduler_config
    tables = runner.input_batch.block_table.block_tables
    for table in tables:
        calls.add_always(_map_slots, scheduler.max_num_batched_tokens, *_of_table(table))
    drafting = worker.vllm_config.speculative_config
    if drafting is None or drafting.method != "mtp":
        return
    requests, drafted = scheduler.max_num_seqs, drafting.num_speculative_tokens
    calls.add_always(_prepare_drafting, requests)
    # Of the batch's longest drafts, and one: near the longest context fewer tokens are drafted.
    for sampled in range(1, 2 + drafted):
        calls.add_always(_take_next_tokens, requests, sampled, runner.input_batch.vocab_size)
    if drafted > 1:
        drafter = runner.drafter
        table = tables[drafter.kv_cache_gid].block_table.gpu
        calls.add_always(_step_drafts, requests, drafter.block_size, drafter.max_model_len, table)


def _counts(most: int) -> list[int]:
    """A number of each form."""
    return one_of_each(range(1, most + 1), lambda n: (n == 1, n % 16 == 0))


def _tensor(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(1, dtype=dtype, device="meta")


def _of_table(table: Any) -> tuple[object, ...]:
    """What of a block table a launch looks at."""
    return (
        table.max_num_batched_tokens,
        table.block_table.gpu,
        table.block_size,
        table.slot_mapping.gpu,
        table.pcp_world_size * table.dcp_world_size,
        table.pcp_rank * table.dcp_world_size + table.dcp_rank,
        table.cp_kv_cache_interleave_size,
    )


def _map_slots(
    tokens: int,
    most_tokens: int,
    blocks: torch.Tensor,
    block_size: int,
    slots: torch.Tensor,
    ranks: int,
    rank: int,
    interleave: int,
) -> None:
    from vllm.v1.worker import block_table

    for count in _counts(tokens):
        block_table._compute_slot_mapping_kernel[(1,)](
            count,
            most_tokens,
            _tensor(torch.int32),
            _tensor(torch.int64),
            stand_in(blocks),
            blocks.stride(0),
            block_size,
            stand_in(slots),
            TOTAL_CP_WORLD_SIZE=ranks,
            TOTAL_CP_RANK=rank,
            CP_KV_CACHE_INTERLEAVE_SIZE=interleave,
            PAD_ID=block_table.PAD_SLOT_ID,
            BLOCK_SIZE=1024,
        )


def _prepare_drafting(requests: int) -> None:
    from vllm.v1.spec_decode.utils import eagle_prepare_inputs_padded_kernel

    int32 = _tensor(torch.int32)
    for count in _counts(requests):
        eagle_prepare_inputs_padded_kernel[(1,)](int32, int32, int32, int32, int32, count)


def _take_next_tokens(requests: int, sampled: int, vocab_size: int) -> None:
    from vllm.v1.spec_decode.utils import eagle_prepare_next_token_padded_kernel, next_power_of_2

    int32 = _tensor(torch.int32)
    for count in _counts(requests):
        eagle_prepare_next_token_padded_kernel[(1,)](
            int32,
            _tensor(torch.bool),
            int32,
            int32,
            int32,
            vocab_size,
            sampled,
            count,
            sampled,
            BLOCK_SIZE_TOKENS=next_power_of_2(sampled),
        )


def _step_drafts(requests: int, block_size: int, max_model_len: int, blocks: torch.Tensor) -> None:
    from vllm.v1.spec_decode import utils

    int64 = _tensor(torch.int64)
    for count in _counts(requests):
        utils.eagle_step_slot_mapping_metadata_kernel[(1,)](
            int64,
            stand_in(blocks),
            blocks.stride(0),
            _tensor(torch.int32),
            int64,
            int64,
            block_size=block_size,
            max_model_len=max_model_len,
            n_blocks_per_req=blocks.size(1),
            PAD_ID=utils.PADDING_SLOT_ID,
            batch_size=count,
        )
