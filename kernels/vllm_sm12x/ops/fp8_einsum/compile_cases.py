"""What the compile gate compiles of this operation; see :mod:`vllm_sm12x.proof.case`."""

from __future__ import annotations

from vllm_sm12x.ops.fp8_einsum.config import TABLE, EinsumConfig
from vllm_sm12x.ops.fp8_einsum.kernel import einsum_kernel
from vllm_sm12x.proof.case import CompileCase, case_of_row, sm12x_rows

TABLES = (TABLE,)

_POINTERS = {"a": "*fp8e4nv", "a_scale": "*fp32", "b": "*fp8e4nv", "out": "*bf16"}
_DIVISIBLE_BY_16 = ("a", "a_token", "a_group", "b", "b_group", "b_row", "out", "out_token",
                    "out_group")  # fmt: skip
# DeepSeek V4 Flash's outputs and inputs a group.
_N, _K = 1024, 4096


def cases() -> list[CompileCase]:
    """Every row under an SM12x target, with either type of the weights' scales."""
    rows = {config: name for name, config in sm12x_rows(TABLE)}
    return [_case(name, row, scale) for row, name in rows.items() for scale in ("fp32", "u8")]


def _case(name: str, config: EinsumConfig, scale: str) -> CompileCase:
    constexprs = {
        # The result's columns are neighbours.
        "out_column": 1,
        "N": _N,
        "K": _K,
        "BLOCK_T": config.block_t,
        "BLOCK_N": config.block_n,
        "WEIGHTS_FIRST": config.weights_first,
        "PARTS": config.parts,
        "DEPENDENT": config.dependent,
    }
    return case_of_row(
        f"tokens={name} scale={scale}",
        einsum_kernel,
        {**_POINTERS, "b_scale": f"*{scale}"},
        constexprs,
        config,
        instructions=("QMMA.16832.F32.E4M3.E4M3",),
        divisible_by_16=_DIVISIBLE_BY_16,
    )
