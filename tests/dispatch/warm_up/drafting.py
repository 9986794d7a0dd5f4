"""What vLLM's runner, drafter and rejection sampler launch around a step, by their own code."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from flash_engine import DRAFTED, MOST_REQUESTS, MOST_TOKENS


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def map_slots(worker: SimpleNamespace, requests: int, tokens: int) -> None:
    """Of the batch, for every group of the cache."""
    worker.model_runner.input_batch.block_table.compute_slot_mapping(
        requests,
        meta(MOST_REQUESTS + 1)[: requests + 1],
        meta(MOST_TOKENS, dtype=torch.int64)[:tokens],
    )


def draft(worker: SimpleNamespace, requests: int, sampled: int) -> None:
    """Up to the first draft and between drafts, where ``sampled`` tokens a request were sampled."""
    from vllm.v1.spec_decode import utils
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    runner = worker.model_runner
    backup = SimpleNamespace(gpu=meta(MOST_REQUESTS), copy_to_gpu=lambda count: None)
    SpecDecodeBaseProposer.prepare_next_token_ids_padded(
        SimpleNamespace(backup_next_token_ids=backup),
        meta(requests, sampled),
        {},
        SimpleNamespace(num_reqs=0, vocab_size=runner.input_batch.vocab_size),
        meta(MOST_REQUESTS, dtype=torch.bool)[:requests],
    )
    SpecDecodeBaseProposer.prepare_inputs_padded(
        SimpleNamespace(),
        MagicMock(
            num_reqs=requests,
            query_start_loc=meta(MOST_REQUESTS + 1)[: requests + 1],
            query_start_loc_cpu=torch.arange(requests + 1),
        ),
        SimpleNamespace(cu_num_draft_tokens=meta(requests)),
        meta(requests),
    )
    table = runner.input_batch.block_table[runner.drafter.kv_cache_gid].block_table.gpu
    utils.eagle_step_update_slot_mapping_and_metadata(
        positions_1d=meta(requests, dtype=torch.int64),
        block_table_tensor=table[:requests],
        seq_lens=meta(MOST_REQUESTS)[:requests],
        block_size=runner.drafter.block_size,
        max_model_len=runner.drafter.max_model_len,
        out_clamped_positions=meta(MOST_TOKENS, dtype=torch.int64)[:requests],
        out_slot_mapping=meta(MOST_TOKENS, dtype=torch.int64)[:requests],
    )


def reject(worker: SimpleNamespace, requests: int, drafted: int, greedy: bool) -> None:
    """Sample with rejection; ``greedy`` where all requests are."""
    from vllm.v1.sample.rejection_sampler import rejection_sample

    tokens = requests * drafted
    rejection_sample(
        meta(tokens),
        [drafted] * requests,
        drafted,
        meta(requests),
        None,
        meta(tokens, worker.model_runner.input_batch.vocab_size, dtype=torch.float32),
        meta(requests, 1),
        SimpleNamespace(
            all_greedy=greedy,
            all_random=False,
            temperature=meta(requests, dtype=torch.float32),
            generators={},
        ),
    )


def every_step(worker: SimpleNamespace) -> None:
    """All numbers of requests, with and without drafts, and many numbers of tokens."""
    for requests in range(1, MOST_REQUESTS + 1):
        for tokens in {requests, requests * (1 + DRAFTED), 97 * requests, MOST_TOKENS - requests}:
            map_slots(worker, requests, tokens)
        for sampled in range(1, 2 + DRAFTED):
            draft(worker, requests, sampled)
        for drafted in range(1, 1 + DRAFTED):
            for greedy in (False, True):
                reject(worker, requests, drafted, greedy)
