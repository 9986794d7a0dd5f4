"""Compiles what sampling launches for the options that a request may have.

vLLM's own run of the sampler has 32 requests, all with temperature, top-k and top-p, and a draft
each. What other requests launch in Triton's kernels is found here by vLLM's own functions, on
tensors without memory. Functions that vLLM gives to ``torch.compile`` compile when they are called;
:func:`call_compiled_functions` calls them on small tensors.

Which there are, and who sees to each, is in ``tests/dispatch/warm_up/README.md``.
"""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from vllm_sm12x.ops.launching import one_of_each

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_sm12x.adapters.warm_up_runner import Calls


def add_sampling(calls: Calls, worker: Worker) -> None:
    """Add the calls of sampling, and with drafts those of rejecting them.

    Args:
        calls: They are added to it.
        worker: A GPU worker with vLLM's first model runner.
    """
    config, requests = worker.vllm_config, worker.vllm_config.scheduler_config.max_num_seqs
    vocab_size = worker.model_runner.input_batch.vocab_size
    drafting, drafted = config.speculative_config, config.num_speculative_tokens
    calls.add_always(
        _apply_grammar, requests * (1 + drafted), vocab_size, config.model_config.dtype
    )
    add_likely(calls, worker)
    if drafting is None:
        return
    calls.add_always(_spread_options, vocab_size)
    kept = (False, True) if drafting.draft_sample_method == "probabilistic" else (False,)
    for probabilities in kept:
        calls.add_always(_reject, drafted, vocab_size, probabilities)


def add_likely(calls: Calls, worker: Worker) -> None:
    """Add the calls of top-k and top-p alone, which take by far the longest to compile.

    Args:
        calls: They are added to it.
        worker: As of :func:`add_sampling`; its model need not be there.
    """
    config = worker.vllm_config
    rows = config.scheduler_config.max_num_seqs * max(1, config.num_speculative_tokens)
    calls.add_always(_keep_likely, rows, worker.model_runner.input_batch.vocab_size)


def call_compiled_functions(worker: Worker) -> None:
    """Call what ``torch.compile`` compiles in the first step that needs it.

    It compiles again where a size is 1, or was equal to another and no longer is.

    Args:
        worker: As of :func:`add_sampling`.
    """
    runner = worker.model_runner
    with torch.inference_mode():  # as steps are; it would compile again in the other mode
        _rank(runner.device, runner.input_batch.vocab_size)
        if runner.use_async_spec_decode:
            _correct_lengths(runner)


def _tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _of_each_form(numbers: range) -> list[int]:
    return one_of_each(numbers, lambda n: (n == 1, n % 16 == 0))


def _apply_grammar(rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    """Of JSON, tools and other grammars: all rows of the logits, or some."""
    import xgrammar
    from vllm.model_executor.layers.vocab_parallel_embedding import pad_vocab_size

    # As cut from what the output layer gives.
    logits = _tensor(rows, pad_vocab_size(vocab_size), dtype=dtype)[:, :vocab_size]
    mask = xgrammar.allocate_token_bitmask(1, vocab_size).to("meta")
    # "triton" is what "auto" is on a GPU.
    for count in _of_each_form(range(1, rows + 1)):
        xgrammar.apply_token_bitmask_inplace(logits[:count], mask, backend="triton")
    # None where the requests with a grammar have left the batch meanwhile.
    for count in _of_each_form(range(rows + 1)):
        some = _tensor(count, dtype=torch.int32)
        xgrammar.apply_token_bitmask_inplace(logits, mask, indices=some, backend="triton")


def _keep_likely(rows: int, vocab_size: int) -> None:
    """By top-k, top-p or both. Few rows are sorted: the others are between two powers of two."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    for count in one_of_each(range(1, rows + 1), lambda n: (n.bit_length(), n % 16 == 0)):
        k, p = _tensor(count, dtype=torch.int32), _tensor(count, dtype=torch.float32)
        # What takes longest to compile comes first.
        for options in ((k, p), (k, None), (None, p)):
            apply_top_k_top_p(_tensor(count, vocab_size, dtype=torch.float32), *options)


def _spread_options(vocab_size: int) -> None:
    """The options of requests to their drafts. In vLLM's own run top-k has another type."""
    from vllm.v1.sample.rejection_sampler import apply_sampling_constraints

    one = _tensor(1, dtype=torch.float32)
    apply_sampling_constraints(
        _tensor(1, vocab_size, dtype=torch.float32),
        _tensor(1, dtype=torch.int32),
        SimpleNamespace(
            all_greedy=False, temperature=one, top_k=_tensor(1, dtype=torch.int32), top_p=one
        ),
    )


def _reject(drafted: int, vocab_size: int, probabilities: bool) -> None:
    """Drafts of requests that are all greedy, or not; with their probabilities, or without."""
    from vllm.v1.sample.rejection_sampler import rejection_sample

    int32 = _tensor(1, dtype=torch.int32)
    likely = _tensor(1, vocab_size, dtype=torch.float32)
    for greedy in (True, False):
        rejection_sample(
            int32,
            [1],
            drafted,
            int32,
            likely if probabilities else None,
            likely,
            _tensor(1, 1, dtype=torch.int32),
            SimpleNamespace(
                all_greedy=greedy,
                all_random=False,
                temperature=_tensor(1, dtype=torch.float32),
                generators={},
            ),
        )


def _rank(device: torch.device, vocab_size: int) -> None:
    """For log-probabilities of answers and prompts."""
    from vllm.v1.sample.sampler import Sampler

    tokens = torch.zeros(2, dtype=torch.int64, device=device)
    Sampler.gather_logprobs(torch.zeros(2, vocab_size, device=device), 1, tokens)


def _correct_lengths(runner: SimpleNamespace) -> None:
    """After the drafts of a step were rejected, with the next step made before."""
    from vllm.v1.spec_decode.utils import update_num_computed_tokens_for_batch_change

    most = len(runner.num_computed_tokens)
    # All sizes unlike first: that compiles what equal ones can use too.
    now, before = ([n for n in sizes if n <= most] for sizes in ((2, 3, most, 1), (3, 2, most, 1)))
    for requests, sampled in product(now, before):
        update_num_computed_tokens_for_batch_change(
            _like(runner.num_computed_tokens),
            _like(runner.num_accepted_tokens.gpu)[:requests],
            _like(runner.prev_positions.gpu)[:requests],
            torch.zeros(sampled, dtype=torch.int32, device=runner.device),
            _like(runner.prev_num_draft_tokens.gpu),
            torch.zeros(requests, dtype=torch.int32, device=runner.device),
        )


def _like(buffer: torch.Tensor) -> torch.Tensor:
    """Zeros that ``torch.compile`` cannot tell from the buffer."""
    with torch.inference_mode(buffer.is_inference()):
        return torch.zeros_like(buffer)
