"""What the compile gate compiles of this operation; see :mod:`vllm_sm12x.proof.case`."""

from __future__ import annotations

from vllm_sm12x.ops.compressor.config import TABLE, Row
from vllm_sm12x.ops.compressor.kernel import compress_kernel
from vllm_sm12x.proof.case import CompileCase, case_of_row, sm12x_rows

TABLES = (TABLE,)

_TYPES = {
    "state_cache": "*fp32",
    "token_to_request": "*i32",
    "positions": "*i64",
    "state_slots": "*i64",
    "block_table": "*i32",
    "norm_weight": "*bf16",
    "eps": "fp32",
    "cos_sin_cache": "*fp32",
    "cache": "*u8",
    "slots": "*i64",
}
# What the launcher finds divisible by 16 and the kernel does not exempt from specialisation. Pages
# of 64 entries are 37,440 bytes apart, those of 2 entries 1,728.
_DIVISIBLE_BY_16 = (
    "state_cache",
    "state_block",
    "state_row",
    "block_table",
    "norm_weight",
    "cos_sin_cache",
    "cos_sin_stride",
    "cache",
    "page_stride",
)


def cases() -> list[CompileCase]:
    """A case for every row under an SM12x target; rows that the targets share come once."""
    return [_case(window, row) for window, row in sm12x_rows(TABLE)]


def _case(window: int, row: Row) -> CompileCase:
    # C4A's windows are two groups of 4, C128A's one of 128.
    overlap = window == 8
    constexprs = {
        "RATIO": window // 2 if overlap else window,
        "OVERLAP": overlap,
        "STEP": row.step,
        "GROUPS": row.groups,
    }
    return case_of_row(
        f"compressor window={window}",
        compress_kernel,
        _TYPES,
        constexprs,
        row,
        divisible_by_16=_DIVISIBLE_BY_16,
    )
