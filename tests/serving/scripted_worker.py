"""A vLLM worker that has no model: it says what a request's script says, or words without sense.

Named by ``--worker-cls``. All around it is vLLM's: the server, the parsers, the scheduler with
DeepSeek V4 Flash's own groups of the KV cache, drafting, grammars, the processes. A step gives up
to three tokens a request, as MTP=2 does: drafts are made, and some of them are wrong.

A request brings a script as ``vllm_xargs={"script": text}``; then comes the end of the answer.
Without one the tokens follow from the prompt and the position alone, so that the answer is the same
in every batch, and never end by themselves. A grammar wins over both.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.tokenizers import get_tokenizer
from vllm.v1.outputs import DraftTokenIds, LogprobsLists, ModelRunnerOutput
from vllm.v1.utils import compute_iteration_details
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from tests.dispatch import flash_cache

SCRIPT = "script"
# Seconds of a step, and of each prompt token in it.
STEP_S = float(os.environ.get("SCRIPTED_STEP_S", "0.004"))
TOKEN_S = float(os.environ.get("SCRIPTED_TOKEN_S", "0.000002"))
KV_CACHE_BYTES = 64 << 30
# What is likely: the token that is said, and less so the others that are listed.
LOGPROB, OTHER_LOGPROB = -0.5, -5.0
# Of drafts: every third first one and every second second one is wrong.
WRONG = (3, 2)


@dataclass
class Spoken:
    """A request: its prompt, what was said so far, what is still to be computed of both."""

    prompt: list[int]
    script: list[int] | None
    logprobs: int | None
    said: list[int] = field(default_factory=list)


class ScriptedWorker(WorkerBase):
    """One rank; only rank 0's answers count, the others do the same."""

    def init_device(self) -> None:
        """Join the other ranks, over gloo."""
        with set_current_vllm_config(self.vllm_config):
            init_worker_distributed_environment(
                self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, "gloo"
            )

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Take the tokenizer: scripts are text."""
        self.tokenizer = get_tokenizer(
            self.model_config.tokenizer, tokenizer_mode=self.model_config.tokenizer_mode
        )
        self.eos = self.model_config.hf_config.eos_token_id
        # Words only: no special token, no byte.
        self.words = range(self.vocab_size // 2, self.vocab_size)
        self.requests: dict[str, Spoken] = {}
        self.drafts: dict[str, list[int]] = {}
        # The names of steps, while they are traced.
        self.traced: list[str] | None = None

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """Every layer's of DeepSeek V4 Flash, whatever the checkpoint's width."""
        return flash_cache.layer_specs()

    def determine_available_memory(self) -> int:
        """Nothing is allocated."""
        return KV_CACHE_BYTES

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Nothing is allocated."""

    def initialize_cache(self, num_gpu_blocks: int, num_cpu_blocks: int) -> None:
        """Nothing is allocated."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Nothing is compiled."""
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def get_supported_tasks(self) -> tuple[str, ...]:
        """What the server asks for."""
        return ("generate",)

    def execute_model(self, scheduled: Any) -> ModelRunnerOutput | None:
        """Take down what the scheduler gives to this step; ``sample_tokens`` answers."""
        for name in scheduled.finished_req_ids:
            self.requests.pop(name, None)
        for new in scheduled.scheduled_new_reqs:
            wanted = new.sampling_params
            script = (wanted.extra_args or {}).get(SCRIPT)
            tokens = None if script is None else self._tokens(script)
            self.requests[new.req_id] = Spoken(list(new.prompt_token_ids), tokens, wanted.logprobs)
        if not scheduled.total_num_scheduled_tokens:
            return ModelRunnerOutput(req_ids=[], req_id_to_index={})
        self.scheduled = scheduled
        if self.traced is not None:
            did = compute_iteration_details(scheduled)
            self.traced.append(
                f"execute_context_{did.num_ctx_requests}({did.num_ctx_tokens})"
                f"_generation_{did.num_generation_requests}({did.num_generation_tokens})"
            )
        self._meet()
        return None

    def sample_tokens(self, grammar: Any) -> ModelRunnerOutput:
        """The tokens of each request: those drafts that were right, and one more."""
        scheduled = self.scheduled
        done = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        done |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        allowed = _allowed(grammar, scheduled.scheduled_spec_decode_tokens)
        time.sleep(STEP_S + TOKEN_S * scheduled.total_num_scheduled_tokens)
        names = list(scheduled.num_scheduled_tokens)
        sampled, self.drafts = [], {}
        for name in names:
            drafted = scheduled.scheduled_spec_decode_tokens.get(name, [])
            spoken = self.requests[name]
            until = done[name] + scheduled.num_scheduled_tokens[name] - len(drafted)
            new: list[int] = []
            if until >= len(spoken.prompt) + len(spoken.said):
                for position, draft in enumerate([*drafted, None]):
                    rows = allowed.get(name)
                    new.append(self._next(spoken, rows[position] if rows is not None else None))
                    spoken.said.append(new[-1])
                    if new[-1] != draft:
                        break
                self.drafts[name] = self._draft(spoken)
            sampled.append(new)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            logprobs=self._logprobs(names, sampled),
        )

    def take_draft_token_ids(self) -> DraftTokenIds:
        """What comes next by the worker's own knowledge, but for the wrong ones."""
        return DraftTokenIds(list(self.drafts), list(self.drafts.values()))

    def profile(self, is_start: bool = True, profile_prefix: str | None = None) -> None:
        """Leave a trace of as many steps as there were, of one kernel each; nothing is timed."""
        if is_start:
            self.traced = []
            return
        folder = Path(self.vllm_config.profiler_config.torch_profiler_dir)
        events = []
        traced, self.traced = self.traced or [], None
        for number, name in enumerate(traced):
            step = {"ph": "X", "cat": "user_annotation", "ts": 10.0 * number, "dur": 9.0}
            events.append(step | {"name": name})
            kernel = {"ph": "X", "cat": "kernel", "ts": 10.0 * number + 1, "dur": 5.0}
            events.append(kernel | {"name": "paged_logits_kernel"})
        file = f"tp{self.rank}_rank{self.rank}.{time.time_ns()}.pt.trace.json"
        (folder / file).write_text(json.dumps({"traceEvents": events}), encoding="utf-8")

    def _meet(self) -> None:
        """Wait for the other ranks, as an all-reduce of NCCL does: for ever, where one is dead."""
        if self.parallel_config.world_size == 1:
            return
        try:
            torch.distributed.barrier(get_tp_group().cpu_group)
        except RuntimeError:  # gloo tells, NCCL does not
            time.sleep(3600)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _next(self, spoken: Spoken, allowed: np.ndarray | None) -> int:
        """The token after what was said; the nearest that a grammar allows, where it has a say."""
        position = len(spoken.said)
        if spoken.script is not None:
            wanted = spoken.script[position] if position < len(spoken.script) else self.eos
        else:
            seed = zlib.crc32(np.array([*spoken.prompt[-32:], position], np.int32).tobytes())
            wanted = self.words[seed % len(self.words)]
        if allowed is None or allowed[wanted]:
            return wanted
        choices = np.flatnonzero(allowed)
        return int(choices[wanted % len(choices)])

    def _draft(self, spoken: Spoken) -> list[int]:
        count = self.vllm_config.speculative_config.num_speculative_tokens
        ahead = Spoken(spoken.prompt, spoken.script, None, list(spoken.said))
        drafts = []
        for number in range(count):
            token = self._next(ahead, None)
            ahead.said.append(token)
            wrong = len(ahead.said) % WRONG[number % len(WRONG)] == 0
            drafts.append(self.words[0] if wrong else token)
        return drafts

    def _logprobs(self, names: list[str], sampled: list[list[int]]) -> LogprobsLists | None:
        """A row a token: itself, and as many others as the largest wish in the batch."""
        wishes = [self.requests[name].logprobs for name in names]
        if all(wish is None for wish in wishes):
            return None
        others = max(wish or 0 for wish in wishes)
        rows = [[token, *range(others)] for tokens in sampled for token in tokens]
        ids = np.array(rows, np.int32).reshape(len(rows), others + 1)
        values = np.full(ids.shape, OTHER_LOGPROB, np.float32)
        values[:, 0] = LOGPROB
        starts = np.cumsum([0, *(len(tokens) for tokens in sampled)])[:-1].tolist()
        return LogprobsLists(ids, values, np.ones(len(rows), np.int32), starts)


def _allowed(grammar: Any, drafted: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """The tokens that grammars allow, ``[1 + drafts, vocabulary]`` bool, by request."""
    if grammar is None:
        return {}
    rows, first = {}, 0
    for name in grammar.structured_output_request_ids:
        last = first + 1 + len(drafted.get(name, ()))
        packed = np.ascontiguousarray(grammar.grammar_bitmask[first:last])
        rows[name] = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little").astype(bool)
        first = last
    return rows
