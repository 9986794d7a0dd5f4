"""What the compile gate compiles of this operation; see :mod:`vllm_sm12x.proof.case`."""

from __future__ import annotations

from vllm_sm12x.ops.paged_mqa_logits.config import TABLE, Row
from vllm_sm12x.ops.paged_mqa_logits.kernel import paged_logits_kernel
from vllm_sm12x.proof.case import CompileCase

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
    rows = {
        (heads, row): None
        for target, table in TABLE.items()
        if target != "sm_90"
        for (heads, _), row in table.items()
    }
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
    return CompileCase(
        label=f"decode logits heads={heads} {tiling}",
        kernel=paged_logits_kernel,
        signature={
            name: _POINTERS.get(name, "i32")
            for name in paged_logits_kernel.arg_names
            if name not in constexprs
        },
        constexprs=constexprs,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
        instructions=("QMMA.16832.F32.E4M3.E4M3",),
        divisible_by_16=_DIVISIBLE_BY_16,
        maxnreg=row.maxnreg,
        configuration=row,
    )
