"""What a step of DeepSeek V4 Flash must at least compute and read, by operation.

From it follows what an operation would gain at the roof of the machine. Weights are read once a
step, each touched expert once, each key once a query; activations are left out, so that the roof is
never too slow. Numbers are for one GPU of ``tp``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# One key of attention in the cache (448 e4m3, 64 bf16, 8 scales), one of the indexer.
KEY_BYTES, INDEX_KEY_BYTES = 584, 132
# An MXFP4 value: half a byte, and a scale byte for 32.
MXFP4_BYTES = 0.5 + 1 / 32


@dataclass(frozen=True)
class Work:
    """Operations (a multiply and an add are two), and bytes of device memory."""

    flops: float = 0.0
    nbytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)

    def us(self, copy_gbps: float, matmul_tflops: float) -> float:
        """Microseconds at the roof: the larger of the two."""
        return max(self.nbytes / copy_gbps / 1e3, self.flops / matmul_tflops / 1e6)


def passes(config: Mapping[str, Any], requests: int, mtp: int) -> Iterator[tuple[int, int]]:
    """The compression ratio of each layer that a decode step passes, and the rows that pass it.

    The model and the first draft see a request's last token and its drafts; the drafts after that
    see one token each.
    """
    ratios = config["compress_ratios"]
    rows = requests * (1 + mtp)
    for ratio in ratios[: config["num_hidden_layers"]]:
        yield ratio, rows
    for draft in range(mtp):
        yield ratios[-1], requests if draft else rows


def decode(
    config: Mapping[str, Any], requests: int, context: int, mtp: int, tp: int = 1
) -> dict[str, Work]:
    """A decode step: ``requests`` rows and their drafts, each with ``context`` tokens behind it."""
    total: dict[str, Work] = {}
    for ratio, rows in passes(config, requests, mtp):
        keys = _keys(config, ratio, context)
        _add(total, _weights(config, ratio, rows, tp))
        _add(total, {"sparse_mla_decode": _attention(config, rows * keys, tp)})
        if ratio == 4:
            index = _index(config, rows * (context // 4))
            # The rows of one request read the same keys.
            nbytes = requests * (context // 4) * INDEX_KEY_BYTES
            _add(total, {"paged_mqa_logits": Work(index, nbytes)})
    head = config["vocab_size"] * config["hidden_size"] / tp
    for sampled in (requests * (1 + mtp), *[requests] * mtp):
        _add(total, {"other matrix products": Work(2 * head * sampled, 2 * head)})
    return total


def prefill(
    config: Mapping[str, Any], tokens: int, behind: int, mtp: int, tp: int = 1
) -> dict[str, Work]:
    """A chunk of ``tokens`` of one prompt with ``behind`` tokens before it."""
    total: dict[str, Work] = {}
    middle = behind + tokens // 2
    # The first draft reads the chunk too; those after it see one token.
    for ratio, _ in passes(config, 1, min(mtp, 1)):
        _add(total, _weights(config, ratio, tokens, tp))
        keys = tokens * _keys(config, ratio, middle)
        # Keys are gathered once; neighbours share them.
        read = (behind + tokens) / max(ratio, 1) * KEY_BYTES
        flops = _attention(config, keys, tp).flops
        _add(total, {"sparse_mla_prefill": Work(flops, read)})
        if ratio == 4:
            index = _index(config, tokens * (middle // 4))
            nbytes = (behind + tokens) // 4 * INDEX_KEY_BYTES
            _add(total, {"mqa_logits": Work(index, nbytes)})
    return total


def _add(total: dict[str, Work], more: Mapping[str, Work]) -> None:
    for operation, work in more.items():
        total[operation] = total.get(operation, Work()) + work


def _weights(config: Mapping[str, Any], ratio: int, rows: int, tp: int) -> dict[str, Work]:
    """The products of one layer with its weights, for so many rows."""
    hidden, inter = config["hidden_size"], config["moe_intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    q_rank, low = config["q_lora_rank"], config["o_groups"] * config["o_lora_rank"]
    replicated = hidden * (q_rank + config["head_dim"])
    if ratio == 4:
        replicated += q_rank * config["index_n_heads"] * config["index_head_dim"]
    split = q_rank * heads + low * hidden + 3 * hidden * inter
    linear = replicated + split / tp
    einsum = heads * config["o_lora_rank"] / tp
    experts = config["n_routed_experts"]
    each = 3 * hidden * inter / tp
    chosen = rows * config["num_experts_per_tok"]
    # Drawn evenly; a row's experts are distinct.
    missed = (1 - config["num_experts_per_tok"] / experts) ** rows
    return {
        "fp8_linear": Work(2 * linear * rows, linear),
        "fp8_einsum": Work(2 * einsum * rows, einsum),
        "mxfp4_experts": Work(2 * each * chosen, experts * (1 - missed) * each * MXFP4_BYTES),
    }


def _keys(config: Mapping[str, Any], ratio: int, context: int) -> int:
    """How many keys a query meets."""
    window = min(config["sliding_window"], context)
    if ratio == 4:
        return window + min(config["index_topk"], context // 4)
    return window + (context // ratio if ratio else 0)


def _attention(config: Mapping[str, Any], pairs: float, tp: int) -> Work:
    """Scores and sums of so many pairs of a query and a key."""
    width = config["num_attention_heads"] * config["head_dim"] / tp
    return Work(4 * width * pairs, pairs * KEY_BYTES)


def _index(config: Mapping[str, Any], pairs: float) -> float:
    return 2 * config["index_n_heads"] * config["index_head_dim"] * pairs
