"""Every tensor of a DeepSeek V4 checkpoint: its name, shape and format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tests.checkpoint.formats import FP8_BLOCK, MXFP4_GROUP
from tests.engine.drawing import Kind

Format = Literal["bf16", "f32", "i64", "fp8", "mxfp4"]

_BYTES = {"bf16": 2, "f32": 4, "i64": 8, "fp8": 1}


@dataclass(frozen=True)
class Weight:
    """One weight, of one or two tensors.

    ``name`` is the published one. ``shape`` counts values: a weight in ``fp8`` or ``mxfp4`` has a
    second tensor, its scales, whose name ends in ``.scale`` instead of ``.weight``. ``kind`` says
    how its values are drawn; ``None`` is the routing table.
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    kind: Kind | None

    @property
    def scale_name(self) -> str:
        """Name of the tensor of its scales."""
        return self.name.removesuffix(".weight") + ".scale"

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        values = math.prod(self.shape)
        if self.format == "mxfp4":
            return values // 2 + values // MXFP4_GROUP
        scales = values // FP8_BLOCK**2 if self.format == "fp8" else 0
        return values * _BYTES[self.format] + scales


def weights(config: Mapping[str, Any]) -> list[Weight]:
    """All weights of the checkpoint that ``config`` describes, in the order of the layers."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    found = [Weight("embed.weight", (vocabulary, hidden), "bf16", "embedding")]
    for layer, ratio in enumerate(config["compress_ratios"][:layers]):
        hashed = layer < config["num_hash_layers"]
        found += _block(f"layers.{layer}", config, ratio, hashed)
    found += [
        Weight("norm.weight", (hidden,), "bf16", "norm"),
        Weight("head.weight", (vocabulary, hidden), "bf16", "head"),
        *_head_mix("", config),
    ]
    return found + list(_mtp("mtp.0", config))


def _mtp(at: str, config: Mapping[str, Any]) -> Iterator[Weight]:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield Weight(f"{at}.emb.tok_emb.weight", (vocabulary, hidden), "bf16", "embedding")
    yield Weight(f"{at}.head.weight", (vocabulary, hidden), "bf16", "head")
    yield Weight(f"{at}.enorm.weight", (hidden,), "bf16", "norm")
    yield Weight(f"{at}.hnorm.weight", (hidden,), "bf16", "norm")
    yield Weight(f"{at}.e_proj.weight", (hidden, hidden), "fp8", "linear")
    yield Weight(f"{at}.h_proj.weight", (hidden, hidden), "fp8", "linear")
    yield from _block(at, config, ratio=0, hashed=False)
    yield Weight(f"{at}.norm.weight", (hidden,), "bf16", "norm")
    yield from _head_mix(f"{at}.", config)


def _block(at: str, config: Mapping[str, Any], ratio: int, hashed: bool) -> Iterator[Weight]:
    hidden = config["hidden_size"]
    yield from _attention(f"{at}.attn", config, ratio)
    yield from _experts(f"{at}.ffn", config, hashed)
    yield Weight(f"{at}.attn_norm.weight", (hidden,), "bf16", "norm")
    yield Weight(f"{at}.ffn_norm.weight", (hidden,), "bf16", "norm")
    streams = config["hc_mult"]
    mixes = (2 + streams) * streams
    for part in ("attn", "ffn"):
        yield Weight(f"{at}.hc_{part}_fn", (mixes, streams * hidden), "f32", "linear")
        yield Weight(f"{at}.hc_{part}_base", (mixes,), "f32", "heavy_hc_base")
        yield Weight(f"{at}.hc_{part}_scale", (3,), "f32", "hc_scale")


def _head_mix(at: str, config: Mapping[str, Any]) -> Iterator[Weight]:
    streams = config["hc_mult"]
    yield Weight(f"{at}hc_head_fn", (streams, streams * config["hidden_size"]), "f32", "linear")
    yield Weight(f"{at}hc_head_base", (streams,), "f32", "heavy_hc_base")
    yield Weight(f"{at}hc_head_scale", (1,), "f32", "hc_scale")


def _attention(at: str, config: Mapping[str, Any], ratio: int) -> Iterator[Weight]:
    hidden, rank, head = config["hidden_size"], config["q_lora_rank"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["o_groups"]
    output = groups * config["o_lora_rank"]
    yield Weight(f"{at}.wq_a.weight", (rank, hidden), "fp8", "linear")
    yield Weight(f"{at}.q_norm.weight", (rank,), "bf16", "norm")
    yield Weight(f"{at}.wq_b.weight", (heads * head, rank), "fp8", "linear")
    yield Weight(f"{at}.wkv.weight", (head, hidden), "fp8", "linear")
    yield Weight(f"{at}.kv_norm.weight", (head,), "bf16", "key_norm")
    yield Weight(f"{at}.wo_a.weight", (output, heads * head // groups), "fp8", "linear")
    yield Weight(f"{at}.wo_b.weight", (hidden, output), "fp8", "attention_output")
    yield Weight(f"{at}.attn_sink", (heads,), "f32", "heavy_sink")
    if ratio:
        yield from _compressor(f"{at}.compressor", hidden, head, ratio, "key_norm")
    if ratio == 4:
        index_heads, index_head = config["index_n_heads"], config["index_head_dim"]
        yield Weight(f"{at}.indexer.wq_b.weight", (index_heads * index_head, rank), "fp8", "linear")
        yield Weight(f"{at}.indexer.weights_proj.weight", (index_heads, hidden), "bf16", "linear")
        yield from _compressor(f"{at}.indexer.compressor", hidden, index_head, ratio, "norm")


def _compressor(at: str, hidden: int, head: int, ratio: int, norm: Kind) -> Iterator[Weight]:
    # C4A's windows overlap: each token has a row for its own window and one for the next.
    width = 2 * head if ratio == 4 else head
    yield Weight(f"{at}.ape", (ratio, width), "f32", "heavy_position_bias")
    yield Weight(f"{at}.wkv.weight", (width, hidden), "bf16", "linear")
    yield Weight(f"{at}.wgate.weight", (width, hidden), "bf16", "linear")
    yield Weight(f"{at}.norm.weight", (head,), "bf16", norm)


def _experts(at: str, config: Mapping[str, Any], hashed: bool) -> Iterator[Weight]:
    hidden, intermediate = config["hidden_size"], config["moe_intermediate_size"]
    experts = config["n_routed_experts"]
    yield Weight(f"{at}.gate.weight", (experts, hidden), "bf16", "linear")
    if hashed:
        table = (config["vocab_size"], config["num_experts_per_tok"])
        yield Weight(f"{at}.gate.tid2eid", table, "i64", None)
    else:
        yield Weight(f"{at}.gate.bias", (experts,), "f32", "router_bias")
    routed = [(f"{at}.experts.{expert}", "mxfp4") for expert in range(experts)]
    for name, form in [*routed, (f"{at}.shared_experts", "fp8")]:
        yield Weight(f"{name}.w1.weight", (intermediate, hidden), form, "linear")
        yield Weight(f"{name}.w2.weight", (hidden, intermediate), form, "linear")
        yield Weight(f"{name}.w3.weight", (intermediate, hidden), form, "linear")
