"""vLLM's Marlin experts, called as ``fused_marlin_moe`` does, from its library alone.

Random bytes stand for the repacked weights: the time does not depend on them. So this says nothing
about results. The activation is a Triton kernel here, where vLLM has one from ``torch.compile``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import triton
import triton.language as tl

from benchmarks.mxfp4_experts.inputs import EXPERTS, HIDDEN, LIMIT, TOP_K, Batch

LIBRARY = "_moe_C.abi3.so"
# vLLM's number for E2M1 (`scalar_types.float4_e2m1f.id`).
_E2M1 = 562949953487106


def load(path: Path | None) -> bool:
    """Load the library from ``path`` or from the vLLM that is installed; whether there is one."""
    if path is None:
        found = importlib.util.find_spec("vllm")
        for folder in (found.submodule_search_locations or []) if found else []:
            if (Path(folder) / LIBRARY).is_file():
                path = Path(folder) / LIBRARY
    if path is None:
        return False
    torch.ops.load_library(str(path))
    return True


def align(topk_ids: torch.Tensor, block_size: int, num_experts: int):
    """As vLLM's ``moe_align_block_size``."""
    pairs = topk_ids.numel()
    padded = pairs + num_experts * (block_size - 1)
    if pairs < num_experts:
        padded = min(pairs * block_size, padded)
    kinds = dict(dtype=torch.int32, device=topk_ids.device)
    routing = (
        torch.empty(padded, **kinds),
        torch.empty(triton.cdiv(padded, block_size), **kinds),
        torch.empty(1, **kinds),
    )
    torch.ops._moe_C.moe_align_block_size(topk_ids, num_experts, block_size, *routing, None)
    return routing


@triton.jit
def _swiglu_kernel(x_ptr, out_ptr, limit, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // (SIZE // BLOCK)).to(tl.int64)
    column = tl.program_id(0) % (SIZE // BLOCK) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * 2 * SIZE + column).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * SIZE + SIZE + column).to(tl.float32)
    gate = tl.minimum(gate, limit)
    up = tl.clamp(up, -limit, limit)
    tl.store(out_ptr + row * SIZE + column, (gate * tl.sigmoid(gate) * up).to(tl.bfloat16))


class Marlin:
    """A layer; calling it with a batch runs all that ``fused_marlin_moe`` does."""

    def __init__(self, intermediate: int) -> None:
        def weight(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
            packed = torch.randint(
                -(2**31),
                2**31,
                (EXPERTS, columns // 16, 2 * rows),
                dtype=torch.int32,
                device="cuda",
            )
            scale = torch.randint(
                116, 122, (EXPERTS, columns // 32, rows), dtype=torch.uint8, device="cuda"
            )
            return packed, scale.view(torch.float8_e8m0fnu)

        self.intermediate = intermediate
        self.w13 = weight(2 * intermediate, HIDDEN)
        self.w2 = weight(HIDDEN, intermediate)
        count = torch.cuda.get_device_properties().multi_processor_count
        self.workspace = torch.zeros(4 * count, dtype=torch.int32, device="cuda")

    def __call__(self, batch: Batch) -> None:
        tokens = batch.hidden_states.size(0)
        pairs = tokens * TOP_K
        block = next(b for b in (8, 16, 32, 48, 64) if b == 64 or pairs / EXPERTS / b < 0.9)
        routing = align(batch.topk_ids, block, EXPERTS)
        size = self.intermediate
        kinds = dict(dtype=torch.bfloat16, device="cuda")
        shared = torch.empty(pairs * max(2 * size, HIDDEN), **kinds)
        gate_up = shared[: pairs * 2 * size].view(pairs, 2 * size)
        activation = torch.empty(pairs, size, **kinds)
        result = shared[: pairs * HIDDEN].view(pairs, HIDDEN)
        self._product(batch, batch.hidden_states, gate_up, self.w13, routing, block, TOP_K)
        _swiglu_kernel[(pairs * (size // 512),)](gate_up, activation, LIMIT, SIZE=size, BLOCK=512)
        self._product(batch, activation, result, self.w2, routing, block, 1)
        torch.ops._moe_C.moe_sum(result.view(tokens, TOP_K, HIDDEN), batch.out)

    def _product(self, batch, x, out, weight, routing, block, top_k) -> None:
        torch.ops._moe_C.moe_wna16_marlin_gemm(
            x,
            out,
            weight[0],
            None,
            weight[1],
            *(None,) * 5,
            self.workspace,
            *routing,
            batch.topk_weights,
            block,
            top_k,
            top_k == 1,
            _E2M1,
            x.size(0),
            out.size(1),
            x.size(1),
            True,
            False,
            True,
            False,
            -1,
            -1,
            -1,
        )
