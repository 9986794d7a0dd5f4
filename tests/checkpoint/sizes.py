"""The sizes of checkpoint that are made, and what a configuration must keep to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.checkpoint.formats import FP8_BLOCK
from tests.engine.flash_config import flash_config

# What a size changes in the full width of `flash_config`. A narrower model keeps the dimensions
# that kernels are written for (heads of 448 + 64, indexer heads of 128, a window of 128, four
# streams) and has fewer heads, experts and token ids.
SIZES: dict[str, dict[str, Any]] = {
    # Every kind of tensor and layer in a few MB, for a CPU. No GPU kernel selects 32 entries.
    "tiny": {
        "compress_ratios": (0, 4, 128),
        "vocab_size": 512,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        # Few heads would leave many entries without a score, all alike.
        "index_n_heads": 16,
        "index_topk": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
    },
    # Below 40 MB, so that it can be carried; the engine's kernels take it, with TP 1 and 2.
    "small": {
        "compress_ratios": (0, 4, 128),
        "vocab_size": 1024,
        "hidden_size": 512,
        "num_attention_heads": 16,
        "q_lora_rank": 128,
        "o_groups": 4,
        "o_lora_rank": 128,
        # Experts chosen by rank, where rounding may choose another one, in one layer alone.
        "num_hash_layers": 2,
        "n_routed_experts": 16,
        "moe_intermediate_size": 256,
    },
    # Five layers of Flash's full width, and its MTP layer: 26 GB.
    "wide": {},
}

RATIOS = (0, 4, 128)

# The bytes, the special tokens and a few words.
MINIMAL_VOCABULARY = 320


def config_of(size: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``config.json`` of a size, with single fields changed.

    ``compress_ratios`` in ``changes`` is one entry a layer, without the MTP layer's.

    Raises:
        ValueError: There is no such size or field, or :func:`check` refuses the result.
    """
    if size not in SIZES:
        raise ValueError(f"size: {size!r}, allowed: {', '.join(SIZES)}")
    wanted = SIZES[size] | dict(changes or {})
    ratios = wanted.pop("compress_ratios", None)
    config = flash_config(tuple(ratios)) if ratios is not None else flash_config()
    unknown = sorted(wanted.keys() - config.keys())
    if unknown:
        raise ValueError(f"{unknown[0]}: no field of config.json, allowed: {', '.join(config)}")
    config |= wanted
    check(config)
    return config


def check(config: Mapping[str, Any]) -> None:
    """Refuse what cannot be laid out.

    Raises:
        ValueError: It names the field, its value and what is allowed.
    """

    def require(name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}: {config[name]}, allowed: {allowed}")

    layers = config["num_hidden_layers"]
    ratios = config["compress_ratios"]
    require("compress_ratios", set(ratios) <= set(RATIOS), f"entries of {RATIOS}")
    require("compress_ratios", len(ratios) == layers + 1 > 1, f"{layers} layers and the MTP layer")
    require("compress_ratios", ratios[-1] == 0, "0 for the MTP layer")
    require("num_nextn_predict_layers", config["num_nextn_predict_layers"] == 1, "1")
    require("n_shared_experts", config["n_shared_experts"] == 1, "1")
    for name in ("hidden_size", "q_lora_rank", "o_lora_rank", "moe_intermediate_size", "head_dim"):
        require(name, _positive_multiple(config[name], FP8_BLOCK), f"multiples of {FP8_BLOCK}")
    groups = config["o_groups"]
    heads = config["num_attention_heads"]
    require("num_attention_heads", _positive_multiple(heads, groups), f"multiples of {groups}")
    experts = config["n_routed_experts"]
    top_k = config["num_experts_per_tok"]
    require(
        "n_routed_experts",
        experts & (experts - 1) == 0 and experts >= top_k,
        f"powers of two, {top_k} and more",
    )
    require("num_hash_layers", 0 <= config["num_hash_layers"] <= layers, f"0 to {layers}")
    require(
        "vocab_size",
        config["vocab_size"] >= MINIMAL_VOCABULARY,
        f"{MINIMAL_VOCABULARY} and more",
    )


def _positive_multiple(value: int, factor: int) -> bool:
    return value > 0 and value % factor == 0
