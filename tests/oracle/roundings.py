"""The oracle with the engine's number formats, to learn how far they alone move a result.

What vLLM stores or multiplies in a narrow format is rounded to it, in place; every sum stays in
float32. So a run with these roundings differs from an exact one as a right engine does, by another
draw of the same noise.

* bfloat16: residual streams, what each module reads and gives, queries, keys' rotated part, logits.
* FP8 (e4m3): the input of every FP8 linear, in groups of 128; the 448 values of a cached key
  without position, in groups of 64; the indexer's queries and keys, a row. Scales are powers of
  two, but for the linears of CUTLASS, which are all but the first of the output projection's two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

E4M3_MAX = 448.0


def bf16(values: torch.Tensor) -> torch.Tensor:
    """Round to bfloat16."""
    return values.to(torch.bfloat16).float()


def fp8(values: torch.Tensor, group: int, power_of_two: bool = True) -> torch.Tensor:
    """Round to e4m3 in groups along the last dimension, each with the least scale that fits.

    Args:
        power_of_two: Whether a scale is the next power of two.

    Raises:
        ValueError: The last dimension is no multiple of ``group``.
    """
    if values.shape[-1] % group:
        raise ValueError(f"values: shape {tuple(values.shape)}, allowed: multiples of {group} last")
    groups = values.unflatten(-1, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    scale = largest / E4M3_MAX
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def cached_key(keys: torch.Tensor, rotated: int) -> torch.Tensor:
    """Round keys as the cache holds them: FP8, and bfloat16 for the last ``rotated`` values."""
    keys = bf16(keys)
    return torch.cat([fp8(keys[..., :-rotated], 64), keys[..., -rotated:]], dim=-1)


class Rounded:
    """An :class:`tests.oracle.model.Arithmetic` with the engine's formats."""

    def layer(
        self, layer: theirs.DeepseekV4DecoderLayer, streams: torch.Tensor, **inputs: Any
    ) -> torch.Tensor:
        """The decoder layer, its modules called in the same order."""
        ids = inputs.pop("input_ids")
        inputs["past_key_values"] = _RoundingCache(layer.self_attn)
        with _rounding(layer):
            streams = bf16(streams)
            post, comb, collapsed = layer.attn_hc(streams)
            given, _ = layer.self_attn(bf16(layer.input_layernorm(bf16(collapsed))), **inputs)
            streams = _mixed(streams, post, comb, given)
            post, comb, collapsed = layer.ffn_hc(streams)
            read = bf16(layer.post_attention_layernorm(bf16(collapsed)))
            return _mixed(streams, post, comb, layer.mlp(read, input_ids=ids))

    def logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """The engine's projection reads and gives bfloat16."""
        return bf16(bf16(hidden) @ head.t())


def _mixed(
    streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor, given: torch.Tensor
) -> torch.Tensor:
    placed = post.unsqueeze(-1) * bf16(given).unsqueeze(-2)
    return bf16(placed + torch.matmul(comb.transpose(-1, -2), streams))


class _RoundingCache:
    """Stands where ``transformers`` keeps keys from call to call; it only rounds what passes."""

    def __init__(self, attention: theirs.DeepseekV4Attention) -> None:
        self.rotated = attention.config.qk_rope_head_dim
        self.layers = {attention.layer_idx: self}
        self.ratio = getattr(attention.compressor, "compress_rate", 1)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rounded = cached_key(keys, self.rotated)
        return rounded, rounded

    def store_compression_weights(
        self, name: str, kv: torch.Tensor, gate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        whole = kv.shape[1] // self.ratio * self.ratio
        return kv[:, :whole], gate[:, :whole], 0

    def update_overlap_state(self, *state: object) -> tuple[None, None]:
        return None, None

    def update_compressor_states(self, name: str, compressed: torch.Tensor) -> torch.Tensor:
        if name == "indexer":
            return fp8(bf16(compressed), compressed.shape[-1])
        return cached_key(compressed, self.rotated)


@contextmanager
def _rounding(layer: theirs.DeepseekV4DecoderLayer) -> Iterator[None]:
    """Hooks on the modules of a layer, and on the attention function, while it runs."""
    handles = []

    def read(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            return (change(given[0]), *given[1:])

        handles.append(module.register_forward_pre_hook(hook))

    def give(module: nn.Module) -> None:
        handles.append(module.register_forward_hook(lambda m, i, given: bf16(given)))

    def activation(x: torch.Tensor) -> torch.Tensor:
        return fp8(bf16(x), 128, power_of_two=False)

    attention, mlp = layer.self_attn, layer.mlp
    eight_bit = [
        *(attention.q_a_proj, attention.q_b_proj, attention.kv_proj),
        attention.o_b_proj,
        *(mlp.shared_experts.gate_proj, mlp.shared_experts.up_proj, mlp.shared_experts.down_proj),
    ]
    indexer = getattr(attention.compressor, "indexer", None)
    if indexer is not None:
        eight_bit.append(indexer.q_b_proj)
        read(indexer.scorer, lambda q: fp8(bf16(q), q.shape[-1]))
        give(indexer.scorer.weights_proj)
    for module in eight_bit:
        read(module, activation)
        give(module)
    # Its operand is quantised with the rotation back, in the formats of the einsum.
    read(attention.o_a_proj, lambda x: fp8(bf16(x), 128))
    give(attention.o_a_proj)
    for module in (attention.q_a_norm, attention.kv_norm, mlp.experts):
        give(module)
    gated = mlp.experts._apply_gate
    eager = theirs.eager_attention_forward

    def attend(
        module: nn.Module, query: torch.Tensor, *given: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, weights = eager(module, bf16(query), *given, **options)
        return bf16(output), weights

    try:
        with (
            mock.patch.object(theirs, "eager_attention_forward", attend),
            mock.patch.object(mlp.experts, "_apply_gate", lambda x: bf16(gated(bf16(x)))),
        ):
            yield
    finally:
        for handle in handles:
            handle.remove()
