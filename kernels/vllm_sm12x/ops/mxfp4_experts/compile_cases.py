"""What the compile gate compiles of this operation; see :mod:`vllm_sm12x.proof.case`."""

from __future__ import annotations

from vllm_sm12x.ops.mxfp4_experts.bfloat16 import halve_kernel
from vllm_sm12x.ops.mxfp4_experts.config import FLOAT8_TABLE, SUM, TABLE, Product, Row, Sum
from vllm_sm12x.ops.mxfp4_experts.float8 import quantize_kernel
from vllm_sm12x.ops.mxfp4_experts.kernel import (
    local_experts_kernel,
    product_kernel,
    weighted_sum_kernel,
)
from vllm_sm12x.ops.mxfp4_experts.launch import LOCAL_BLOCK, QUANTIZE_WARPS, prefetch_lines
from vllm_sm12x.proof.case import CompileCase, sm12x_rows

TABLES = (TABLE, FLOAT8_TABLE, SUM)

# DeepSeek V4 Flash; the intermediate size as each of two GPUs has it, and as one.
_HIDDEN, _TOP_K = 4096, 6
_INTERMEDIATE = (1024, 2048)

_VARIABLE = (
    "pairs",
    "mapped",
    "experts",
    "limit",
    "ids_ptr",
    "map_ptr",
    "router_weight_ptr",
)


def cases() -> list[CompileCase]:
    """Both products of every row under an SM12x target, then the small kernels."""
    rows, float8 = (
        {row: kind for kind, row in sm12x_rows(table)} for table in (TABLE, FLOAT8_TABLE)
    )
    found = [
        _product(f"{kind} I={size} {name}", row, size, gated)
        for row, kind in rows.items()
        for size in (_INTERMEDIATE if kind in ("few", "64") else _INTERMEDIATE[:1])
        for name, gated in (("first", True), ("second", False))
    ]
    found += [
        _product(f"float8 {kind} I={size} {name}", row, size, gated, float8=True)
        for row, kind in float8.items()
        for size in (_INTERMEDIATE if kind == "64" else _INTERMEDIATE[:1])
        for name, gated in (("first", True), ("second", False))
    ]
    few, many = (next(row for row, k in rows.items() if k == kind) for kind in ("few", "64"))
    sums = dict.fromkeys(config for target, config in SUM.items() if target != "sm_90")
    return [
        *found,
        # Columns that are no whole steps, and scales that are no words.
        _product("few I=544 second", few, 544, False, words=False),
        _product("64 I=544 second", many, 544, False, words=False),
        _product("few I=2048 first with everything", few, 2048, True, everything=True),
        _product("64 I=2048 first with everything", many, 2048, True, everything=True),
        *(
            _sum(config, mapped, dependent)
            for config in sums
            for mapped, dependent in ((False, False), (False, True), (True, True))
        ),
        _local(),
        *(_quantize(columns) for columns in (_HIDDEN, *_INTERMEDIATE)),
        _halve(_HIDDEN),
    ]


def _product(
    label: str,
    row: Row,
    intermediate: int,
    gated: bool,
    *,
    words: bool = True,
    everything: bool = False,
    float8: bool = False,
) -> CompileCase:
    """With ``everything`` comes an expert map, or the router's weight on the input."""
    how: Product = row.first if gated else row.second
    signature = {
        "x_ptr": "*fp8e4nv" if float8 else "*bf16" if row.halves else "*i32",
        "x_stride": "i32",
        "x_scale_ptr": "*fp32",
        "weight_ptr": "*u8",
        "weight_expert_stride": "i32",
        "weight_row_stride": "i32",
        "scale_ptr": "*i32" if words else "*u8",
        "scale_expert_stride": "i32",
        "scale_row_stride": "i32",
        "out_ptr": "*bf16" if gated else "*fp32",
        "router_weight_ptr": "*fp32",
        "limit": "fp32",
        "ids_ptr": "*i32",
        "map_ptr": "*i32",
        "sorted_ptr": "*i32",
        "tile_expert_ptr": "*i32",
        "padded_ptr": "*i32",
        "pairs": "i32",
        "mapped": "i32",
        "experts": "i32",
    }
    absent = set() if float8 else {"x_scale_ptr"}
    if row.most_pairs == 0:
        absent |= {"ids_ptr", "map_ptr"}
    else:
        absent |= {"sorted_ptr", "tile_expert_ptr", "padded_ptr"}
    if not everything:
        absent |= {"map_ptr"}
    if not gated:
        absent |= {"limit"}
    if not everything:
        absent |= {"router_weight_ptr"}
    signature = {name: kind for name, kind in signature.items() if name not in absent}
    return CompileCase(
        label=label,
        kernel=product_kernel,
        signature=signature,
        constexprs={
            **dict.fromkeys(absent),
            "TOP_K": _TOP_K,
            "ROWS": intermediate if gated else _HIDDEN,
            "COLUMNS": _HIDDEN if gated else intermediate,
            "GATED": gated,
            "MOST_PAIRS": row.most_pairs,
            "BLOCK_M": row.block_m,
            "HALVES": row.halves and not float8,
            "BLOCK_N": how.block_n,
            "BLOCK_K": how.block_k,
            "SCALE_WORDS": words,
            "DEPENDENT": row.dependent,
            "PREFETCH": 0 if gated else prefetch_lines(row, intermediate),
            "SCALE_SLOTS": (_HIDDEN if gated else intermediate) // 128 if float8 else 0,
        },
        num_warps=how.num_warps,
        num_stages=how.num_stages,
        maxnreg=how.maxnreg,
        instructions=("QMMA.16832.F32.E4M3.E4M3" if float8 else "HMMA.16816.F32.BF16",),
        divisible_by_16=tuple(
            name
            for name in signature
            if name not in _VARIABLE and (words or not name.startswith("scale_"))
        ),
        configuration=row,
    )


def _sum(config: Sum, mapped: bool, dependent: bool) -> CompileCase:
    signature = {
        "result_ptr": "*fp32",
        "router_weight_ptr": "*fp32",
        "ids_ptr": "*i32",
        "map_ptr": "*i32",
        "out_ptr": "*bf16",
        "out_stride": "i32",
        "mapped": "i32",
        "experts": "i32",
    }
    absent = {} if mapped else {"map_ptr": None}
    signature = {name: kind for name, kind in signature.items() if name not in absent}
    return CompileCase(
        label=f"sum of {config.block}"
        + (" mapped" if mapped else "")
        + (" dependent" if dependent else ""),
        kernel=weighted_sum_kernel,
        signature=signature,
        constexprs={
            **absent,
            "TOP_K": _TOP_K,
            "HIDDEN": _HIDDEN,
            "BLOCK": config.block,
            "DEPENDENT": dependent,
        },
        num_warps=config.num_warps,
        num_stages=1,
        divisible_by_16=tuple(name for name in signature if name not in _VARIABLE),
        configuration=config,
    )


def _local() -> CompileCase:
    signature = {
        "ids_ptr": "*i32",
        "map_ptr": "*i32",
        "local_ptr": "*i32",
        "pairs": "i32",
        "mapped": "i32",
        "experts": "i32",
    }
    return CompileCase(
        label="local experts",
        kernel=local_experts_kernel,
        signature=signature,
        constexprs={"BLOCK": LOCAL_BLOCK},
        num_warps=4,
        num_stages=3,
        divisible_by_16=("local_ptr",),
    )


def _quantize(columns: int) -> CompileCase:
    signature = {"x_ptr": "*bf16", "x_stride": "i32", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    return CompileCase(
        label=f"quantize {columns}",
        kernel=quantize_kernel,
        signature=signature,
        constexprs={"COLUMNS": columns, "BLOCK": columns},
        num_warps=QUANTIZE_WARPS,
        num_stages=3,
        divisible_by_16=tuple(signature),
    )


def _halve(columns: int) -> CompileCase:
    signature = {"x_ptr": "*bf16", "x_stride": "i32", "out_ptr": "*bf16"}
    return CompileCase(
        label=f"halve {columns}",
        kernel=halve_kernel,
        signature=signature,
        constexprs={"COLUMNS": columns, "BLOCK": columns},
        num_warps=QUANTIZE_WARPS,
        num_stages=3,
        divisible_by_16=tuple(signature),
    )
