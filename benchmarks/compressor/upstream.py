"""What the compiler makes of vLLM's Triton forms of the compressor and cache kernels, for SM12x.

``SM12X_PORTABLE``'s operation ``cutedsl`` chooses these. They belong to vLLM, so the compile gate
does not go through them. :func:`cases` gives them as it takes them, with the parameters that vLLM's
callers give at DeepSeek V4 Flash's sizes. ``python -m benchmarks.compressor.upstream`` prints the
table of README.md; it needs vLLM and no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_sm12x.proof.case import CompileCase
    from vllm_sm12x.proof.gate import Report

# Of a token in the state cache: columns of the vectors, and as many of the scores.
_OVERLAPPING = 2
_POINTERS = {
    "state_cache_ptr": "*fp32",
    "token_to_req_indices_ptr": "*i32",
    "positions_ptr": "*i64",
    "slot_mapping_ptr": "*i64",
    "block_table_ptr": "*i32",
    "rms_norm_weight_ptr": "*bf16",
    "rms_norm_eps": "fp32",
    "cos_sin_cache_ptr": "*fp32",
    "k_cache_ptr": "*u8",
    "kv_slot_mapping_ptr": "*i64",
    "kv_ptr": "*fp32",
    "score_ptr": "*fp32",
    "ape_ptr": "*fp32",
    "out_ptr": "*bf16",
    "seq_lens_ptr": "*i32",
    "gather_lens_ptr": "*i32",
    "pos_ptr": "*i64",
    "index_q_ptr": "*bf16",
    "index_q_cos_sin_ptr": "*fp32",
    "index_q_fp8_ptr": "*fp8e4nv",
    "index_q_mxfp4_ptr": "*u8",
    "index_q_scale_ptr": "*u8",
    "index_weights_ptr": "*bf16",
    "index_weights_softmax_scale": "fp32",
    "index_weights_head_scale": "fp32",
    "index_weights_out_ptr": "*fp32",
}


def cases() -> list[CompileCase]:
    """Every Triton kernel of vLLM that the seam chooses, and the one that fills their state.

    Raises:
        ImportError: vLLM is not installed, or has turned Triton off.
    """
    # By their full names: the package has functions of the same names as its modules.
    compress, cache_utils, indexer_q, states = (
        importlib.import_module(f"vllm.models.deepseek_v4.common.ops.{name}")
        for name in (
            "fused_compress_quant_cache",
            "cache_utils",
            "fused_indexer_q",
            "save_partial_states",
        )
    )
    found = [
        _case(
            "keys, C4A",
            compress._fused_kv_compress_norm_rope_insert_sparse_attn,
            _head(512, 4, quant_block=64, token_stride=576, scale_dim=8, page=37_440),
            num_warps=4,
        ),
        _case(
            "keys, C128A",
            compress._fused_kv_compress_norm_rope_insert_sparse_attn,
            _head(512, 128, quant_block=64, token_stride=576, scale_dim=8, page=1_728),
            num_warps=4,
        ),
        _case(
            "indexer's keys, FP8",
            compress._fused_kv_compress_norm_rope_insert_indexer_attn,
            _head(128, 4, quant_block=128, token_stride=128, scale_dim=4, page=8_640),
            num_warps=1,
        ),
        _case(
            "indexer's keys, MXFP4",
            compress._fused_kv_compress_norm_rope_insert_indexer_mxfp4_attn,
            _head(128, 4, quant_block=32, token_stride=64, scale_dim=4, page=4_608),
            num_warps=1,
        ),
    ]
    for name, width, ratio in (("C4A", 1024, 4), ("C128A", 512, 128), ("indexer", 256, 4)):
        found.append(
            _case(
                f"states, {name}",
                states._save_partial_states_kernel,
                {
                    "HEAD_SIZE": width,
                    "TRITON_BLOCK_SIZE": width,
                    "STATE_WIDTH": width,
                    "COMPRESS_RATIO": ratio,
                },
                num_warps=4,
            )
        )
    for name, block_size, page in (("C4A", 64, 37_440), ("C128A", 2, 1_728)):
        found.append(
            _case(
                f"gather of keys, {name}",
                cache_utils._dequantize_and_gather_k_kernel,
                {
                    "max_blocks_per_seq": 1024,
                    "fp8_dim": 448,
                    "bf16_dim": 64,
                    "scale_dim": 8,
                    "quant_block": 64,
                    "cache_block_size": block_size,
                    "token_data_size": 576,
                    "block_stride": page,
                    "output_dim": 512,
                    "fp8_max": 448.0,
                    "n_quant_blocks": 7,
                },
                num_warps=4,
            )
        )
    query = {"INDEX_Q_HALF_ROT_DIM": 32, "INDEX_Q_HEAD_DIM": 128}
    found += [
        _case(
            "indexer's query, FP8",
            indexer_q._fused_indexer_q_rope_quant_kernel,
            query,
            num_warps=1,
        ),
        _case(
            "indexer's query, MXFP4",
            indexer_q._fused_indexer_q_rope_mxfp4_kernel,
            query | {"MXFP4_BLOCK": 32},
            num_warps=1,
        ),
    ]
    return found


def _head(
    head_size: int, ratio: int, *, quant_block: int, token_stride: int, scale_dim: int, page: int
) -> dict[str, object]:
    """Constants of a compressor; C4A's windows overlap."""
    overlap = ratio == 4
    return {
        "HEAD_SIZE": head_size,
        "TRITON_BLOCK_SIZE": head_size,
        "STATE_WIDTH": head_size * (_OVERLAPPING if overlap else 1),
        "COMPRESS_RATIO": ratio,
        "OVERLAP": overlap,
        "ROPE_HEAD_DIM": 64,
        "FP8_MAX": 448.0,
        "QUANT_BLOCK": quant_block,
        "TOKEN_STRIDE": token_stride,
        "SCALE_DIM": scale_dim,
        "KV_BLOCK_STRIDE": page,
    }


def _case(
    label: str, kernel: object, constexprs: Mapping[str, object], num_warps: int
) -> CompileCase:
    from vllm_sm12x.proof.case import CompileCase

    signature = {
        name: _POINTERS.get(name, "i32") for name in kernel.arg_names if name not in constexprs
    }
    return CompileCase(
        label=label,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        # What Triton takes where the launch names none.
        num_stages=3,
        divisible_by_16=tuple(
            name
            for name, kind in signature.items()
            if kind.startswith("*") or ("stride" in name and "block_table" not in name)
        ),
    )


def examine_all(only: str = "") -> Iterator[Report]:
    """Compile the cases whose label begins with ``only``, for every target."""
    from vllm_sm12x.proof import gate

    chosen = [case for case in cases() if case.label.startswith(only)]
    return gate.examine_all((case, target) for case in chosen for target in gate.TARGETS)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="kernels whose label begins so, such as keys")
    parser.add_argument("--json", action="store_true", help="a line of JSON a row")
    arguments = parser.parse_args()
    # vLLM turns Triton off where it sees a GPU without a driver, and not where it sees none.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    columns = ("kernel", "target", "warps", "registers", "stack", "STL", "LDL", "shared")
    if not arguments.json:
        print("| " + " | ".join(columns) + " |")
        print("|" + " --- |" * len(columns))
    for report in examine_all(arguments.only):
        made = report.compiled
        if made is None:
            print(report.failures[0], file=sys.stderr)
            return 1
        row = (
            report.case.label,
            report.target,
            made.num_warps,
            made.registers,
            made.stack_bytes,
            made.local_stores,
            made.local_loads,
            made.shared_bytes,
        )
        if arguments.json:
            print(json.dumps(dict(zip(columns, row, strict=True))), flush=True)
        else:
            cells = (f"{cell:,}" if isinstance(cell, int) else cell for cell in row)
            print("| " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
