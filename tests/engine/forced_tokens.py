"""A logits processor that makes the engine go on with given tokens.

So decoding can be scored at the same positions by every implementation. vLLM takes the
log-probabilities that it returns before its logits processors run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

# Key of ``SamplingParams.extra_args``: a list of token ids.
FORCED = "forced_tokens"


class ForcedTokens(AdapterLogitsProcessor):
    """Allows one token a step, as long as the request's list lasts."""

    def is_argmax_invariant(self) -> bool:
        """It changes which token is the likeliest."""
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        """The processor of one request, or ``None`` where it forces nothing."""
        forced = (params.extra_args or {}).get(FORCED)
        if not forced:
            return None

        def allow_one(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            if len(output) >= len(forced):
                return logits
            only = torch.full_like(logits, -torch.inf)
            only[forced[len(output)]] = 0.0
            return only

        return allow_one
