"""Run ``transformers``' DeepSeek V4 in float32, one layer at a time in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from transformers import DeepseekV4Model
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4DecoderLayer

from tests.oracle.sequences import Sequence
from tests.oracle.weights import Checkpoint


class Arithmetic(Protocol):
    """How a layer is computed: exactly, or with the engine's roundings."""

    def layer(
        self, layer: DeepseekV4DecoderLayer, streams: torch.Tensor, **inputs: object
    ) -> torch.Tensor:
        """The streams after the layer, float32 ``[1, T, hc_mult, hidden]``."""

    def logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """float32 ``[T, V]`` from the normed ``[T, hidden]`` and the projection."""


class Exact:
    """float32 throughout."""

    def layer(
        self, layer: DeepseekV4DecoderLayer, streams: torch.Tensor, **inputs: object
    ) -> torch.Tensor:
        return layer(streams, **inputs)

    def logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return hidden @ head.t()


@torch.inference_mode()
def log_probabilities(
    checkpoint: Checkpoint,
    sequences: list[Sequence],
    arithmetic: Arithmetic | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[torch.Tensor]:
    """Log-probabilities of the next token after each token of each sequence.

    Each layer's weights are loaded once and dropped after the last sequence went through it.

    Args:
        arithmetic: :class:`Exact` where it is ``None``.
        device: Where the layers run. TF32 must not be switched on.

    Yields:
        For each sequence, float32 ``[T, V]`` on the CPU.
    """
    arithmetic = arithmetic or Exact()
    streams: list[torch.Tensor] = []
    for number in range(checkpoint.config.num_hidden_layers):
        model = checkpoint.layer(number).to(device)
        ids = [torch.tensor([sequence.tokens], device=device) for sequence in sequences]
        if not streams:
            streams = [_embed(model, one) for one in ids]
        for place, one in enumerate(ids):
            streams[place] = _through(model, streams[place], one, arithmetic)
        if number + 1 < checkpoint.config.num_hidden_layers:
            del model
    head = checkpoint.head().to(device)
    for one in streams:
        hidden = model.norm(model.hc_head(one))[0]
        yield torch.log_softmax(arithmetic.logits(hidden, head), dim=-1).cpu()


def _embed(model: DeepseekV4Model, ids: torch.Tensor) -> torch.Tensor:
    embedded = model.embed_tokens(ids).unsqueeze(2)
    return embedded.expand(-1, -1, model.config.hc_mult, -1).contiguous()


def _through(
    model: DeepseekV4Model, streams: torch.Tensor, ids: torch.Tensor, arithmetic: Arithmetic
) -> torch.Tensor:
    """As ``DeepseekV4Model.forward`` calls a layer, without a cache."""
    flat = streams[:, :, 0]
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    mask = create_sliding_window_causal_mask(
        config=model.config,
        inputs_embeds=flat,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    rotations = {
        kind: model.rotary_emb(flat, position_ids=positions, layer_type=kind)
        for kind in ("main", "compress")
    }
    return arithmetic.layer(
        model.layers[0],
        streams,
        position_embeddings=rotations,
        position_ids=positions,
        attention_mask=mask,
        input_ids=ids,
        past_key_values=None,
    )
