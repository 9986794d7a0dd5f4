"""What the compile gate compiles of the decode kernels: every row of their tables for SM12x."""

from __future__ import annotations

from vllm_sm12x.ops.sparse_mla import decode_gluon
from vllm_sm12x.ops.sparse_mla.config_decode import COMBINE, TABLE, CombineRow, Row
from vllm_sm12x.ops.sparse_mla.decode_kernel import _combine_kernel, _split_kernel
from vllm_sm12x.proof.case import CompileCase, case_of_row, sm12x_rows

_TYPES = {
    "q": "*bf16",
    "swa_cache": "*u8",
    "swa_indices": "*i32",
    "swa_lens": "*i32",
    "extra_cache": "*u8",
    "extra_indices": "*i32",
    "extra_lens": "*i32",
    "sink": "*fp32",
    "out": "*bf16",
    "lse": "*fp32",
    "partial": "*fp32",
    "stats": "*fp32",
    "scale": "fp32",
}

# What the launcher finds divisible by 16 and the kernels do not exempt from specialisation.
_DIVISIBLE_BY_16 = (
    "q",
    "q_token",
    "q_head",
    "swa_cache",
    "swa_page_bytes",
    "extra_cache",
    "extra_page_bytes",
    "out",
    "out_token",
    "out_head",
    "partial",
    "stats",
)


def decode_cases() -> list[CompileCase]:
    """Every row under an SM12x target, in each of the variants that a call can take."""
    rows = dict.fromkeys(row for _, row in sm12x_rows(TABLE))
    return [
        *(
            _split_case(row, extra, one_split, lse)
            for row in rows
            for extra, one_split, lse in (
                (False, True, False),
                (False, False, False),
                (True, True, False),
                (True, False, False),
                (True, True, True),
            )
        ),
        *(_combine_case(row, lse) for row in COMBINE.values() for lse in (False, True)),
    ]


def _split_case(row: Row, extra: bool, one_split: bool, lse: bool) -> CompileCase:
    absent = () if extra else ("extra_cache", "extra_indices", "extra_lens")
    absent += () if lse else ("lse",)
    absent += ("partial", "stats") if one_split else ()
    words = (
        f"decode heads={row.block_h} keys={row.block_n}" + (" gluon" if row.parts else ""),
        "extra" if extra else "",
        "" if one_split else "split",
        "lse" if lse else "",
    )
    flags = {
        "HAS_EXTRA": extra,
        "HAS_LSE": lse,
        "ONE_SPLIT": one_split,
        "BLOCK_H": row.block_h,
        "BLOCK_N": row.block_n,
    }
    kernel = _split_kernel
    if row.parts:
        kernel = decode_gluon.split_kernel
        flags["PARTS"] = row.parts
    return _case(" ".join(filter(None, words)), kernel, flags, absent, row)


def _combine_case(row: CombineRow, lse: bool) -> CompileCase:
    flags = {"HAS_LSE": lse, "SPLIT_SLOTS": row.split_slots, "BLOCK_D": row.block_d}
    label = f"decode combine splits={row.split_slots}" + (" lse" if lse else "")
    return _case(label, _combine_kernel, flags, () if lse else ("lse",), row)


def _case(label, kernel, flags, absent, row) -> CompileCase:
    return case_of_row(
        label,
        kernel,
        _TYPES,
        {**flags, **dict.fromkeys(absent)},
        row,
        instructions=() if isinstance(row, CombineRow) else ("HMMA.16816.F32.BF16",),
        divisible_by_16=_DIVISIBLE_BY_16,
    )
