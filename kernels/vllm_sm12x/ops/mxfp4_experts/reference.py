"""Definition, in PyTorch, for CPU and GPU; safe under CUDA-graph capture.

The pairs of a token and an expert are sorted by expert and cut into tiles of a fixed number of
rows, each of one expert. The number of tiles is bounded by shapes alone, so that nothing is read
back from the device. A few tiles at a time, the experts' weights are gathered, dequantised and
multiplied. So the work grows with the pairs and not with tokens times experts, and the experts are
never dequantised all at once.

Rows that pad a tile, and whole tiles that no pair needs, go to a spare row that is not read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_sm12x.ops.ue8m0.reference import scale_blocks_, ue8m0_to_float32

# Values that share one scale, along the inner dimension of a product.
BLOCK = 32

# Bounds of what is alive at a time: the experts' results of a chunk of tokens, and the weights and
# rows of a batch of tiles. A single token, or a single tile, is taken even where it is larger.
RESULT_BUDGET_BYTES = 256 * 2**20
TILE_BUDGET_BYTES = 256 * 2**20

_MIN_ROWS, _MAX_ROWS = 16, 256
_FLOAT32_BYTES = 4
_INT32_BYTES = 4


@dataclass(frozen=True)
class Plan:
    """How a call is cut up; it depends on shapes alone."""

    token_chunk: int
    rows: int
    tiles: int
    tile_batch: int
    result_bytes: int
    tile_bytes: int

    @property
    def scratch_bytes(self) -> int:
        return self.result_bytes + self.tile_batch * self.tile_bytes


def plan(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    weight_bytes: int,
) -> Plan:
    """Cut a call into chunks of tokens and batches of tiles.

    Args:
        weight_bytes: Of a dequantised weight value: 2 on a GPU, 4 on a CPU.
    """
    pair_bytes = hidden_size * _FLOAT32_BYTES
    most_tokens = max(1, RESULT_BUDGET_BYTES // (top_k * pair_bytes))
    # Chunks of equal size: the experts are dequantised once a chunk, however small the last one is.
    chunks = max(1, -(-num_tokens // most_tokens))
    token_chunk = max(1, -(-num_tokens // chunks))
    pairs = token_chunk * top_k

    # Dequantising an expert costs far more than multiplying a few rows by it, so that tiles hold
    # twice the rows that an expert gets on average, and hot experts take several.
    rows = _MIN_ROWS
    while rows < _MAX_ROWS and rows * num_experts < 2 * pairs:
        rows *= 2
    # Each expert that is hit wastes at most rows - 1 rows, and no more experts are hit than pairs.
    tiles = (pairs + min(num_experts, pairs) * (rows - 1)) // rows

    # The larger of the two weights: packed, as int32 table indices, dequantised, and its scales
    # with their copies (at most 16 bytes for the 16 packed bytes of a block).
    packed = intermediate_size * hidden_size
    tile_weight = packed * (1 + _INT32_BYTES + 2 * weight_bytes + 1)
    tile_rows = rows * (
        hidden_size * (weight_bytes + _FLOAT32_BYTES)
        + 3 * intermediate_size * _FLOAT32_BYTES
        + intermediate_size * weight_bytes
    )
    tile_bytes = tile_weight + tile_rows
    tile_batch = max(1, min(tiles, TILE_BUDGET_BYTES // tile_bytes))
    return Plan(token_chunk, rows, tiles, tile_batch, (pairs + 1) * pair_bytes, tile_bytes)


def _byte_values(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[256, 2]``: the two values that a packed byte holds, the low nibble's first.

    Computed where it is needed: a copy from the host could not be captured.
    """
    byte = torch.arange(256, dtype=torch.int32, device=device)
    code = torch.stack((byte & 15, byte >> 4), dim=-1)
    magnitude = code & 7
    exponent, mantissa = magnitude >> 1, magnitude & 1
    # In halves, to stay with integers: 0 and 1, then (2 + m) * 2**(e - 1).
    halves = torch.where(
        magnitude < 2, magnitude, (2 + mantissa) << torch.clamp(exponent - 1, min=0)
    )
    sign = 1 - 2 * (code >> 3)
    return (halves.to(torch.float32) * sign * 0.5).to(dtype)


def dequantize_mxfp4(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    table = _byte_values(dtype, packed.device)
    values = F.embedding(packed.to(torch.int32), table).flatten(-2)
    return scale_blocks_(values, ue8m0_to_float32(scale).to(dtype), (BLOCK,))


def _bmm_float32(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``rows @ weight^T`` a tile, with bfloat16 values, float32 sums and a float32 result.

    A product of two bfloat16 values is exact in float32, so that the GPU's bfloat16 product and the
    CPU's float32 product differ in the order of the sum alone.
    """
    if rows.dtype == torch.bfloat16:
        return torch.bmm(rows, weight.transpose(1, 2), out_dtype=torch.float32)
    return torch.bmm(rows, weight.transpose(1, 2))


def _local_experts(
    topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of each pair's expert in the weights, and whether there is one; else the index is 0."""
    ids = topk_ids.to(torch.int64)
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.size(0))
        local = expert_map[torch.where(known, ids, 0)].to(torch.int64)
        ids = torch.where(known, local, -1)
    routed = (ids >= 0) & (ids < num_experts)
    return torch.where(routed, ids, 0), routed


def mxfp4_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    swiglu_limit: float | None,
    apply_router_weight_on_input: bool,
    expert_map: torch.Tensor | None,
) -> None:
    num_tokens, hidden_size = hidden_states.shape
    top_k = topk_ids.size(1)
    num_experts, _, packed_intermediate = w2.shape
    dtype = torch.bfloat16 if hidden_states.is_cuda else torch.float32
    cut = plan(num_tokens, top_k, num_experts, hidden_size, 2 * packed_intermediate, dtype.itemsize)
    local, routed = _local_experts(topk_ids, num_experts, expert_map)
    for start in range(0, num_tokens, cut.token_chunk):
        tokens = slice(start, start + cut.token_chunk)
        out[tokens] = _experts_of_chunk(
            hidden_states[tokens],
            (w13, w13_scale),
            (w2, w2_scale),
            topk_weights[tokens],
            local[tokens],
            routed[tokens],
            swiglu_limit,
            apply_router_weight_on_input,
            cut,
            dtype,
        )


def _experts_of_chunk(
    hidden_states: torch.Tensor,
    w13: tuple[torch.Tensor, torch.Tensor],
    w2: tuple[torch.Tensor, torch.Tensor],
    topk_weights: torch.Tensor,
    local: torch.Tensor,
    routed: torch.Tensor,
    swiglu_limit: float | None,
    apply_router_weight_on_input: bool,
    cut: Plan,
    dtype: torch.dtype,
) -> torch.Tensor:
    num_tokens, hidden_size = hidden_states.shape
    top_k = local.size(1)
    pairs = num_tokens * top_k
    device = hidden_states.device
    num_experts = w2[0].size(0)

    # Pairs without an expert sort last and belong to no tile.
    key = torch.where(routed, local, num_experts).flatten()
    sorted_key, order = torch.sort(key, stable=True)
    bounds = torch.searchsorted(sorted_key, torch.arange(num_experts + 1, device=device))
    first_pair, count = bounds[:-1], bounds[1:] - bounds[:-1]
    tiles_of_expert = (count + cut.rows - 1) // cut.rows
    last_tile = tiles_of_expert.cumsum(0)
    first_tile = last_tile - tiles_of_expert

    tile = torch.arange(cut.tiles, device=device)
    expert = torch.searchsorted(last_tile, tile, right=True)
    needed = expert < num_experts
    expert = expert.clamp(max=num_experts - 1)
    row = (tile - first_tile[expert])[:, None] * cut.rows + torch.arange(cut.rows, device=device)
    real = needed[:, None] & (row < count[expert][:, None])
    position = torch.where(real, first_pair[expert][:, None] + row, 0)
    source = order[position]
    target = torch.where(real, source, pairs)

    weight_of_pair = topk_weights.flatten()
    results = torch.zeros(pairs + 1, hidden_size, dtype=torch.float32, device=device)
    for start in range(0, cut.tiles, cut.tile_batch):
        batch = slice(start, start + cut.tile_batch)
        router_weight = weight_of_pair[source[batch]].unsqueeze(-1)
        rows = hidden_states[source[batch] // top_k].to(dtype)
        gate_up = _bmm_float32(rows, _weights_of(w13, expert[batch], dtype))
        if apply_router_weight_on_input:
            gate_up.mul_(router_weight)
        activation = _swiglu(gate_up, swiglu_limit).to(torch.bfloat16).to(dtype)
        del gate_up
        result = _bmm_float32(activation, _weights_of(w2, expert[batch], dtype))
        if not apply_router_weight_on_input:
            result.mul_(router_weight)
        results.index_copy_(0, target[batch].flatten(), result.flatten(0, 1))
    return results[:pairs].unflatten(0, (num_tokens, top_k)).sum(dim=1)


def _weights_of(
    weights: tuple[torch.Tensor, torch.Tensor], expert: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    packed, scale = weights
    return dequantize_mxfp4(packed[expert], scale.view(torch.uint8)[expert], dtype)


def _swiglu(gate_up: torch.Tensor, limit: float | None) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = up.clamp(min=-limit, max=limit)
    return F.silu(gate) * up
