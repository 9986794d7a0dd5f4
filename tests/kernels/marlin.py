"""vLLM's Marlin experts on the emulated GPU, called by vLLM's own Python.

vLLM's library carries Marlin's MoE kernels as machine code up to SM90 and as PTX, so that on SM12x
the driver compiles that PTX: it is what runs here. The host code between, which picks a kernel
and launches it, is C++ in the library, and is written out here again, as is the layout's.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from emulator.library import Library
from native_kernels import EmulatedStream

from vllm_sm12x.ops.mxfp4_experts.routing import align_block_size

# Values of the inner dimension and columns of the result that a block of threads takes at a time,
# and its threads: for up to 16 pairs of a token and an expert that stand together, and for more.
Tile = tuple[int, int, int]
SMALL: tuple[Tile, ...] = ((128, 128, 256), (64, 128, 128), (128, 64, 128))
LARGE: tuple[Tile, ...] = ((64, 256, 256), (64, 128, 128), (128, 64, 128))

# Few, so that blocks share the sum of a tile, as they do on a GPU where there are few tiles.
_MULTIPROCESSORS = 5
_LOCKS = 4 * _MULTIPROCESSORS
# vLLM's numbers of bfloat16 activations, E2M1 weights, bfloat16 results and UE8M0 scales.
_TYPES = "ILl1125899906909960ELl562949953487106ELl1125899906909960ELl2814749767106568E"
_STAGES, _SIXTEENS_A_SCALE = 4, 2
_REPACK_THREADS, _WIDEST_TILE = 256, 256


def tiles_for(block: int) -> tuple[Tile, ...]:
    """Those that Marlin has, in the order it tries them.

    Args:
        block: Pairs of a token and an expert that stand together: 8, 16, 32, 48 or 64.
    """
    return SMALL if block <= 16 else LARGE


def marlin_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    *,
    stream: EmulatedStream,
    limit: float | None = None,
    on_input: bool = False,
    tile: Tile | None = None,
) -> None:
    """The experts of a layer as vLLM computes them with Marlin, from the checkpoint's weights.

    Args:
        hidden_states: bfloat16 ``[T, H]``, and so on as in ``vllm_sm12x.ops.mxfp4_experts``.
        stream: Where the kernels run.
        limit: Of the activation.
        on_input: Whether the router's weights apply to the input of the experts.
        tile: Of both products; by default the first that fits.

    Raises:
        ValueError: Marlin has no kernel with this tile for these sizes.
    """
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import (
        prepare_moe_mxfp4_layer_for_marlin,
    )
    from vllm.scalar_type import scalar_types

    # What starts at zero, and is zero again after each product.
    locks = torch.zeros(_LOCKS, dtype=torch.int32)
    # The activation is compiled for the GPU in vLLM, from PyTorch that runs as it stands here.
    with _on(stream, tile), torch.compiler.set_stance("force_eager"):
        layer = SimpleNamespace(params_dtype=hidden_states.dtype)
        w13, w2, w13_scale, w2_scale, *_ = prepare_moe_mxfp4_layer_for_marlin(
            layer, w13, w2, w13_scale, w2_scale, None, None
        )
        marlin_moe.fused_marlin_moe(
            hidden_states,
            w13,
            w2,
            None,
            None,
            w13_scale,
            w2_scale,
            topk_weights,
            topk_ids,
            quant_type_id=scalar_types.float4_e2m1f.id,
            apply_router_weight_on_input=on_input,
            workspace=locks,
            output=out,
            clamp_limit=limit,
        )
    assert not locks.any()


@contextmanager
def _on(stream: EmulatedStream, tile: Tile | None) -> Iterator[None]:
    """vLLM's Python finds Marlin's operations on a stream."""
    import vllm._custom_ops as ops
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe

    def align(topk_ids, block_size, num_experts, expert_map, ignore_invalid_experts):
        return align_block_size(topk_ids, block_size, num_experts)

    with (
        patch.object(ops, "gptq_marlin_repack", functools.partial(_repack, stream)),
        patch.object(ops, "moe_wna16_marlin_gemm", functools.partial(_product, stream, tile)),
        patch.object(marlin_moe, "moe_align_block_size", align),
    ):
        yield


@functools.cache
def _library(name: str) -> Library:
    (folder,) = importlib.util.find_spec("vllm").submodule_search_locations
    return Library(Path(folder) / name)


def _repack(
    stream: EmulatedStream,
    b_q_weight: torch.Tensor,
    perm: torch.Tensor,
    size_k: int,
    size_n: int,
    num_bits: int,
    is_a_8bit: bool,
) -> torch.Tensor:
    """int32 ``[K / 8, N]``, eight values of a column each, in the order that Marlin reads."""
    assert (num_bits, is_a_8bit, perm.numel()) == (4, False, 0)
    out = torch.full((size_k // 16, 2 * size_n), -1, dtype=torch.int32)
    program = _library("_C.abi3.so").program(
        f"gptq_marlin_repack_kernelILi{_REPACK_THREADS}ELi4ELb0ELb0E", _REPACK_THREADS
    )
    stream.launch(program, (_MULTIPROCESSORS, 1, 1), (b_q_weight, None, out, size_k, size_n))
    return out


def _product(
    stream: EmulatedStream,
    tile: Tile | None,
    input: torch.Tensor,
    output: torch.Tensor,
    b_qweight: torch.Tensor,
    b_bias: None,
    b_scales: torch.Tensor,
    a_scales: None,
    global_scale: None,
    b_qzeros: None,
    g_idx: None,
    perm: None,
    workspace: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_past_padded: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    moe_block_size: int,
    top_k: int,
    mul_topk_weights: bool,
    size_m: int,
    size_n: int,
    size_k: int,
    use_fp32_reduce: bool,
    **settings: object,
) -> torch.Tensor:
    """``input [M, K]`` times the weight of each pair's expert, into ``output [M * top_k, N]``."""
    fits = [t for t in tiles_for(moe_block_size) if size_k % t[0] == 0 and size_n % t[1] == 0]
    if not fits or tile is not None and tile not in fits:
        raise ValueError(f"tile: {tile or 'none fits'} for {size_k} x {size_n}, allowed: {fits}")
    depth, width, threads = tile or fits[0]
    small = moe_block_size == 8
    shape = (threads, -(-moe_block_size // 16), width // 16, depth // 16)
    symbol = "".join(f"ELi{number}" for number in shape)
    symbol = f"Marlin{_TYPES}{symbol[1:]}ELb{int(small)}ELi{_STAGES}ELi{_SIXTEENS_A_SCALE}ELb0E"
    shared = min(size_n * sorted_token_ids.numel(), _LOCKS * moe_block_size * _WIDEST_TILE)
    sums = torch.full((shared * (2 if small else 1),), math.nan)
    output.fill_(math.nan)
    stream.launch(
        _library("_moe_C.abi3.so").program(symbol, threads),
        (_MULTIPROCESSORS, 1, 1),
        (
            input,
            b_qweight,
            output,
            sums,
            b_bias,
            a_scales,
            b_scales,
            global_scale,
            b_qzeros,
            g_idx,
            sorted_token_ids,
            expert_ids,
            num_tokens_past_padded,
            topk_weights,
            top_k,
            mul_topk_weights,
            b_scales.size(1),
            size_m,
            size_n,
            size_k,
            workspace,
            False,
            False,
            use_fp32_reduce,
        ),
    )
    return output
