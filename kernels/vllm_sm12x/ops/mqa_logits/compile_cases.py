"""What the compile gate compiles of this operation; see :mod:`vllm_sm12x.proof.case`."""

from __future__ import annotations

from vllm_sm12x.ops.mqa_logits import HEAD_DIM
from vllm_sm12x.ops.mqa_logits.config import TABLE, Row
from vllm_sm12x.ops.mqa_logits.kernel import logits_kernel
from vllm_sm12x.proof.case import CompileCase, case_of_row, sm12x_rows

TABLES = (TABLE,)

_POINTERS = {
    "q": "*fp8e4nv",
    "k": "*fp8e4nv",
    "k_scale": "*fp32",
    "weights": "*fp32",
    "ks": "*i32",
    "ke": "*i32",
    "out": "*fp32",
}
# What the launcher finds divisible by 16 and the kernel does not exempt from specialisation.
_DIVISIBLE_BY_16 = ("q", "k", "weights", "out", "q_token", "q_head", "k_row", "weights_token")


def cases() -> list[CompileCase]:
    """A case for every row under an SM12x target; rows that the targets share come once."""
    return [_case(heads, row) for heads, row in sm12x_rows(TABLE)]


def _case(heads: int, row: Row) -> CompileCase:
    constexprs = {
        "HEADS": heads,
        "HEAD_DIM": HEAD_DIM,
        "BLOCK_N": row.block_n,
        "BLOCK_Q": row.block_q,
        "STAGES": row.num_stages,
        "weights_head": 1,
    }
    return case_of_row(
        f"prefill logits heads={heads}",
        logits_kernel,
        _POINTERS,
        constexprs,
        row,
        instructions=("QMMA.16832.F32.E4M3.E4M3",),
        divisible_by_16=_DIVISIBLE_BY_16,
    )
