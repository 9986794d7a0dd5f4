"""vLLM's own model runner, sampling for drawn requests; what it launches is seen by Triton's keys.

The runner is real, as are its batch, sampler and rejection sampler; there is no model. Logits are
what vLLM's output layer makes of hidden states, without memory or with zeros.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

# It makes vLLM believe in a GPU, so before vLLM.
from flash_engine import MOST_REQUESTS

from flash_config import write_config
from tests.checkpoint.loading import check_loading

PROPERTIES = SimpleNamespace(
    multi_processor_count=188, gcnArchName="", total_memory=80 << 30, major=12, minor=0, name="fake"
)
MAX_MODEL_LEN = 512
PROMPT = 5


@contextmanager
def gpu() -> Iterator[None]:
    """What vLLM and xgrammar ask torch of a GPU; on one, xgrammar takes Triton's kernel."""
    import xgrammar
    from vllm.platforms import current_platform
    from vllm.utils import platform_utils
    from vllm.v1.sample.ops import topk_topp_sampler

    masked = xgrammar.apply_token_bitmask_inplace

    def mask(*arguments: object, backend: str = "triton", **options: object) -> None:
        masked(*arguments, backend=backend, **options)

    platform = type(current_platform)
    with ExitStack() as stack:
        for target, name, new in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "get_device_properties", lambda device=None: PROPERTIES),
            (torch.cuda, "get_device_capability", lambda device=None: (12, 0)),
            (platform, "is_pin_memory_available", classmethod(lambda cls: False)),
            (xgrammar, "apply_token_bitmask_inplace", mask),
            # No kernel of Triton's; its own are there, or are compiled in vLLM's run.
            (topk_topp_sampler, "flashinfer_sample", _first),
            *((torch.Tensor, name, _unseeded(name)) for name in ("exponential_", "uniform_")),
        ):
            stack.enter_context(patch.object(target, name, new))
        for told in (platform_utils.is_pin_memory_available, platform_utils.num_compute_units):
            told.cache_clear()
            stack.callback(told.cache_clear)
        yield


def _unseeded(name: str) -> Callable[..., torch.Tensor]:
    """A random fill that tensors without memory have too: theirs knows no generator."""
    fill = getattr(torch.Tensor, name)

    def either(tensor: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
        return fill(tensor) if tensor.is_meta else fill(tensor, generator=generator)

    return either


def _first(logits: torch.Tensor, *options: object) -> torch.Tensor:
    return logits.new_zeros(len(logits), dtype=torch.int64)


def start(
    folder: Path,
    drafted: int,
    device: str,
    vocab_size: int = 129_280,
    most: int = MOST_REQUESTS,
    **options: Any,
) -> SimpleNamespace:
    """A worker whose runner drafts so many tokens; to be called inside :func:`gpu`.

    Args:
        most: Requests of a step.
        options: Of drafting.
    """
    import flashinfer  # noqa: F401 (asks for a GPU while it is imported)
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    write_config(folder, (0, 4, 128))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": vocab_size}))
    drafting = {"method": "mtp", "num_speculative_tokens": drafted, **options}
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        kv_cache_dtype="fp8",
        block_size=256,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=2048,
        max_num_seqs=most,
        enforce_eager=True,
        speculative_config=drafting if drafted else None,
    ).create_engine_config()
    check_loading.be_rank(1, 0)
    with set_current_vllm_config(config):
        runner = GPUModelRunner(config, torch.device(device))
    runner._sync_device = lambda: None
    if drafted:
        # As the cache's set-up does.
        runner.drafter.kv_cache_gid, runner.drafter.block_size = 0, 256
    return SimpleNamespace(
        vllm_config=config,
        scheduler_config=config.scheduler_config,
        model_runner=runner,
        get_model=torch.nn.Module,
    )


@dataclass(frozen=True)
class Step:
    """Requests of a step: the options and the number of drafts of each, and which have a grammar.

    Attributes:
        options: Arguments of vLLM's ``SamplingParams``.
        drafts: As many; all 0 in a step without drafts.
        grammar: Numbers of requests. Those from ``len(options)`` on have left the batch.
        before: Requests of the step before this.
    """

    options: tuple[dict[str, Any], ...]
    drafts: tuple[int, ...]
    grammar: tuple[int, ...] = ()
    before: int = 1


def steps(seed: int, drafted: int, most: int = MOST_REQUESTS) -> Iterator[Step]:
    """Steps of all small numbers of requests and others, with options that all share, or not."""
    draw = random.Random(seed)
    for count in [n for n in (*range(1, 19), 31, 32, 33, 48, 63, 64) if n <= most]:
        for limits in ({}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.8}):
            for drafts in (0, draw.randrange(drafted + 1), drafted):
                options = []
                for _ in range(count):
                    temperature = draw.choice([0.0, 0.7]) if draw.random() < 0.3 else 0.7
                    options.append({"temperature": temperature, **limits})
                if not limits and draw.random() < 0.5:
                    options = [{"temperature": 0.0}] * count  # All are greedy.
                if draw.random() < 0.7:
                    options = [one | _others(draw, drafted) for one in options]
                if draw.random() < 0.5:
                    options[0] = options[0] | {"seed": 5}
                uneven = drafts > 1 and draw.random() < 0.5
                yield Step(
                    tuple(options),
                    tuple(draw.randrange(drafts + 1) if uneven else drafts for _ in options),
                    _grammar(draw, count),
                    draw.randrange(1, most + 1),
                )


def _grammar(draw: random.Random, count: int) -> tuple[int, ...]:
    """Of no request, of one, of some, of all; and of one that has left."""
    requests = range(count)
    found = draw.choice([[], [draw.choice(requests)], requests[::2], requests, requests])
    return (*found, count) if draw.random() < 0.2 else tuple(found)


def _others(draw: random.Random, drafted: int) -> dict[str, Any]:
    """Other options; vLLM refuses some of them with drafts."""
    every = {
        "logprobs": draw.choice([0, 1, 20]),
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "min_tokens": 9,
        "allowed_token_ids": [1, 2, 3],
        "stop": ["a"],
    }
    if not drafted:
        every |= {"min_p": 0.1, "logit_bias": {3: 1.0}}
    return {name: value for name, value in every.items() if draw.random() < 0.15}


@dataclass
class Sampling:
    """Makes a worker's steps."""

    worker: SimpleNamespace
    made: int = 0
    _ids: list[str] = field(default_factory=list)

    def make(self, step: Step) -> None:
        """What a step launches before the forward pass and after it."""
        runner = self.worker.model_runner
        with torch.inference_mode():
            self._fill(step)
            batch = runner.input_batch
            scheduled = {
                name: 1 + drafts for name, drafts in zip(self._ids, step.drafts, strict=True)
            }
            output = SimpleNamespace(
                total_num_scheduled_tokens=sum(scheduled.values()),
                num_scheduled_tokens=scheduled,
                scheduled_spec_decode_tokens={
                    name: [7] * drafts
                    for name, drafts in zip(self._ids, step.drafts, strict=True)
                    if drafts
                },
            )
            each = np.array([scheduled[name] for name in batch.req_ids], dtype=np.int32)
            wanted, drafts = runner._prepare_inputs(output, each)
            logits = self.logits(len(wanted))
            if step.grammar:
                self._constrain(step, output, logits)
            if drafts is not None:
                self._remember(drafts, logits)
            runner._sample(logits, drafts)

    def read(self, tokens: int, logprobs: int) -> None:
        """The log-probabilities of a prompt's tokens."""
        runner = self.worker.model_runner
        with torch.inference_mode():
            self._fill(Step(({"temperature": 0.7},), (0,)), prompt=tokens + 1, computed=0)
            runner.query_start_loc.np[0] = 0
            runner.num_prompt_logprobs = {self._ids[0]: logprobs}
            runner.model = SimpleNamespace(compute_logits=lambda hidden: self.logits(len(hidden)))
            hidden = torch.zeros(tokens + 1, 16, dtype=runner.dtype, device=runner.device)
            told = runner._get_prompt_logprobs_dict(hidden, {self._ids[0]: tokens + 1})
            assert told[self._ids[0]].logprobs.shape == (tokens, logprobs + 1)

    def logits(self, rows: int) -> torch.Tensor:
        """``[rows, vocabulary]`` of the output layer, from parts of two ranks."""
        from vllm.model_executor.layers import logits_processor
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        runner = self.worker.model_runner
        size, dtype = runner.input_batch.vocab_size, runner.dtype
        head = SimpleNamespace(
            quant_method=UnquantizedEmbeddingMethod(),
            weight=torch.zeros(size // 2, 16, dtype=dtype, device=runner.device),
            bias=None,
        )
        hidden = torch.zeros(rows, 16, dtype=dtype, device=runner.device)
        with patch.object(
            logits_processor,
            "tensor_model_parallel_all_gather",
            lambda part: torch.cat([part, part], dim=-1),
        ):
            return logits_processor.LogitsProcessor(size)(head, hidden)

    def _remember(self, drafts: Any, logits: torch.Tensor) -> None:
        """The drafts' probabilities, if the drafter keeps them; not where it was all greedy."""
        runner = self.worker.model_runner
        if runner.speculative_config.draft_sample_method == "probabilistic" and self.made % 2:
            most = runner.num_spec_tokens
            shape = (len(self._ids), most, logits.shape[1])
            runner._draft_probs = torch.zeros(shape, device=runner.device)
            runner._draft_prob_req_ids = list(runner.input_batch.req_ids)
        else:
            runner._draft_probs = None

    def _fill(self, step: Step, prompt: int = PROMPT, computed: int = PROMPT) -> None:
        """Other requests take the batch, and those of the step before are known."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.worker.gpu_input_batch import CachedRequestState

        runner = self.worker.model_runner
        batch = runner.input_batch
        for name in self._ids:
            batch.remove_request(name)
            runner.requests.pop(name)
        batch.condense()
        self.made += 1
        self._ids = [f"{self.made}-{number}" for number in range(len(step.options))]
        for name, options in zip(self._ids, step.options, strict=True):
            parameters = SamplingParams(**options, detokenize="stop" in options)
            generator = None
            if parameters.seed is not None:
                generator = torch.Generator().manual_seed(parameters.seed)
            state = CachedRequestState(
                req_id=name,
                prompt_token_ids=list(range(prompt)),
                mm_features=[],
                sampling_params=parameters,
                generator=generator,
                block_ids=tuple([1] for _ in batch.block_table.block_tables),
                num_computed_tokens=computed,
                output_token_ids=[3] if computed else [],
            )
            runner.requests[name] = state
            batch.add_request(state)
        batch.refresh_metadata()
        batch.prev_req_id_to_index = {self._ids[-1]: step.before - 1}
        runner.valid_sampled_token_count_gpu = torch.zeros(
            step.before, dtype=torch.int32, device=runner.device
        )

    def _constrain(self, step: Step, output: SimpleNamespace, logits: torch.Tensor) -> None:
        from vllm.v1.core.sched.output import GrammarOutput
        from vllm.v1.structured_output.utils import apply_grammar_bitmask

        names = [*self._ids, "left"]
        rows = sum(1 + (*step.drafts, 0)[number] for number in step.grammar)
        words = -(-logits.shape[1] // 32)
        apply_grammar_bitmask(
            output,
            GrammarOutput(
                [names[number] for number in step.grammar],
                np.full((rows, words), -1, dtype=np.int32),
            ),
            self.worker.model_runner.input_batch,
            logits,
        )
