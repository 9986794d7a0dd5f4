"""What the compile gate compiles of this operation; see :mod:`vllm_sm12x.proof.case`."""

from __future__ import annotations

from vllm_sm12x.ops.paged_mqa_logits.config import TABLE, Row
from vllm_sm12x.ops.paged_mqa_logits.kernel import paged_logits_kernel
from vllm_sm12x.proof.case import CompileCase, case_of_row, sm12x_rows

TABLES = (TABLE,)

_POINTERS = {
    "q": "*fp8e4nv",
    "cache": "*u8",
    "weights": "*fp32",
    "lens": "*i32",
    "table": "*i32",
    "out": "*fp32",
}
# What the launcher finds divisible by 16 and the kernel does not exempt from specialisation.
_DIVISIBLE_BY_16 = (
    "q",
    "cache",
    "weights",
    "out",
    "q_request",
    "q_token",
    "q_head",
    "page_bytes",
    "weights_row",
)


def cases() -> list[CompileCase]:
    """A case for every row under an SM12x target and number of heads; equal ones come once."""
    rows = dict.fromkeys((heads, row) for (heads, _), row in sm12x_rows(TABLE))
    return [_case(heads, row) for heads, row in rows]


def _case(heads: int, row: Row) -> CompileCase:
    constexprs = {
        "HEADS": heads,
        "PAGES": row.pages,
        "STAGES": row.num_stages,
        "weights_head": 1,
    }
    bound = "" if row.maxnreg is None else f" maxnreg={row.maxnreg}"
    tiling = f"pages={row.pages} programs={row.programs}{bound}"
    return case_of_row(
        f"decode logits heads={heads} {tiling}",
        paged_logits_kernel,
        _POINTERS,
        constexprs,
        row,
        instructions=("QMMA.16832.F32.E4M3.E4M3",),
        divisible_by_16=_DIVISIBLE_BY_16,
    )
