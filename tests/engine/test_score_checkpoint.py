"""What becomes of the engine's answers, given in vLLM's own containers; the forced tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.logprobs import (
    append_logprobs_for_next_position,
    create_prompt_logprobs,
    create_sample_logprobs,
)

import score_checkpoint
from tests.engine.forced_tokens import FORCED, ForcedTokens
from tests.oracle.sequences import Sequence

KEPT = 2


def answer(fed, prompt_rows, answer_rows):
    """vLLM's output; a row is the token that came, and the likeliest with log-probabilities."""
    flat = [create_prompt_logprobs(True), create_sample_logprobs(True)]
    for container, rows in zip(flat, (prompt_rows, answer_rows), strict=True):
        for came, likeliest in rows:
            ids = [came, *likeliest]
            values = [dict(likeliest).get(came, -9.0), *likeliest.values()]
            append_logprobs_for_next_position(container, ids, values, [None] * 3, 1, KEPT)
    return SimpleNamespace(
        outputs=[SimpleNamespace(token_ids=[*fed, 77], logprobs=flat[1])], prompt_logprobs=flat[0]
    )


class FakeEngine:
    def __init__(self, *outputs):
        self.outputs = outputs

    def generate(self, prompts, wanted, use_tqdm):
        self.prompts, self.wanted = prompts, wanted
        return list(self.outputs)


SEQUENCES = [Sequence((5, 6, 7), 2), Sequence((8,), 1)]
FIRST = answer(
    [7], [(6, {3: -0.5, 6: -1.5})], [(7, {1: -0.25, 2: -2.0}), (77, {77: -0.125, 4: -3.0})]
)
SECOND = answer([], [], [(77, {9: -0.75, 1: -1.0})])


def test_positions_come_in_the_order_of_the_tokens():
    engine = FakeEngine(FIRST, SECOND)
    tokens, logprobs = score_checkpoint.score(engine, SEQUENCES, KEPT)
    assert tokens.tolist() == [[3, 6], [1, 2], [77, 4], [9, 1]]
    assert logprobs.tolist() == [[-0.5, -1.5], [-0.25, -2.0], [-0.125, -3.0], [-0.75, -1.0]]
    assert (tokens.dtype, logprobs.dtype) == (np.int32, np.float32)
    assert engine.prompts == [{"prompt_token_ids": [5, 6]}, {"prompt_token_ids": [8]}]
    assert [one.max_tokens for one in engine.wanted] == [2, 1]
    assert [one.extra_args for one in engine.wanted] == [{FORCED: [7]}, {FORCED: []}]


def test_an_engine_that_goes_its_own_way_is_an_error():
    other = answer([9], [(6, {3: -0.5, 6: -1.5})], [(9, {1: -0.25, 2: -2.0})] * 2)
    with pytest.raises(ValueError, match="a prompt of 2: the engine did not go on"):
        score_checkpoint.score(FakeEngine(other, SECOND), SEQUENCES, KEPT)


def test_a_missing_position_is_an_error():
    short = answer([7], [], [(7, {1: -0.25, 2: -2.0}), (77, {77: -0.125, 4: -3.0})])
    with pytest.raises(ValueError, match="a prompt of 2: positions are missing"):
        score_checkpoint.score(FakeEngine(short, SECOND), SEQUENCES, KEPT)


def test_tokens_are_forced_while_they_last():
    processor = ForcedTokens(None, torch.device("cpu"), False)
    assert not processor.is_argmax_invariant()
    assert processor.new_req_logits_processor(SamplingParams()) is None
    allow = processor.new_req_logits_processor(SamplingParams(extra_args={FORCED: [4, 0]}))
    logits = torch.arange(6.0)
    assert allow([], logits).argmax() == 4
    assert allow([4], logits).isfinite().nonzero().tolist() == [[0]]
    assert torch.equal(allow([4, 0], logits), logits)
    assert torch.equal(logits, torch.arange(6.0))
