"""Log-probabilities of a prompt, of a request that drafts.

vLLM's own runner, without a model: the drafter writes over the hidden states that it was given, as
its CUDA graphs may on a GPU.
"""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest
import torch


@pytest.fixture
def hidden_states():
    return torch.arange(6.0).view(3, 2)


def sample(hidden_states, num_prompt_logprobs):
    """Have vLLM's runner draft and do the books: hidden states that the two of them were given."""
    from vllm.v1.spec_decode.eagle import EagleProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner = MagicMock()
    runner.num_prompt_logprobs = num_prompt_logprobs
    runner.use_async_scheduling = runner.routed_experts_initialized = False
    runner.drafter = MagicMock(spec=EagleProposer)
    runner.speculative_config.use_eagle.return_value = True
    runner.speculative_config.disable_padded_drafter_batch = False
    runner.num_spec_tokens, runner.effective_drafter_max_model_len = 2, 100
    runner.execute_model_state = (
        MagicMock(),  # what was scheduled
        torch.zeros(1, 8),
        MagicMock(),  # of speculative decoding
        MagicMock(max_seq_len=3),
        hidden_states,
        hidden_states[-1:],
        *(None,) * 4,
    )
    drafted = []

    def draft(scheduled, sampled, sampling, given, *_):
        drafted.append(given.clone())
        hidden_states.fill_(float("nan"))

    runner.propose_draft_token_ids.side_effect = draft
    runner._bookkeeping_sync.return_value = (None,) * 7
    GPUModelRunner.sample_tokens(runner, None)
    ((_, _, _, booked, _), _) = runner._bookkeeping_sync.call_args
    return drafted, booked


def test_they_are_computed_from_what_the_model_gave(hidden_states):
    expected = hidden_states.clone()
    drafted, booked = sample(hidden_states, {"a request": 2})
    assert [one.tolist() for one in drafted] == [expected.tolist()]
    assert hidden_states.isnan().all()
    assert torch.equal(booked, expected)


def test_nothing_is_copied_where_no_request_asks_for_them(hidden_states):
    _, booked = sample(hidden_states, {})
    assert booked is hidden_states
