"""What the compile gate compiles of the prefill kernel: every row of its table for SM12x."""

from __future__ import annotations

from vllm_sm12x.ops.fp8_ds_mla.layout import HEAD_DIM
from vllm_sm12x.ops.sparse_mla import prefill_gluon
from vllm_sm12x.ops.sparse_mla.config_prefill import PREFILL_TABLE, PrefillConfig
from vllm_sm12x.ops.sparse_mla.prefill_kernel import prefill_kernel
from vllm_sm12x.proof.case import CompileCase

_SIGNATURE = {
    "q_ptr": "*bf16",
    "kv_ptr": "*bf16",
    "indices_ptr": "*i32",
    "lens_ptr": "*i32",
    "sink_ptr": "*fp32",
    "out_ptr": "*bf16",
    "softmax_scale": "fp32",
    "rows": "i32",
    "width": "i32",
    "q_token_stride": "i32",
    "q_head_stride": "i32",
    "kv_stride": "i32",
    "indices_stride": "i32",
    "lens_stride": "i32",
    "sink_stride": "i32",
    "out_token_stride": "i32",
    "out_head_stride": "i32",
    "lse_token_stride": "i32",
    "lse_head_stride": "i32",
}
_DIVISIBLE_BY_16 = (
    "q_ptr",
    "kv_ptr",
    "out_ptr",
    "q_token_stride",
    "q_head_stride",
    "kv_stride",
    "out_token_stride",
    "out_head_stride",
)


def prefill_cases() -> list[CompileCase]:
    """A case for every row under an SM12x target; rows that the targets share come once.

    The engine asks for no logarithm of the sum; one case more has it.
    """
    rows = {
        (heads, config): None
        for target, table in PREFILL_TABLE.items()
        if target != "sm_90"
        for heads, config in table.items()
    }
    cases = [_case(heads, config, lse=False) for heads, config in rows]
    return [*cases, *(_case(heads, config, lse=True) for heads, config in rows if heads == 64)]


def _case(heads: int, config: PrefillConfig, lse: bool) -> CompileCase:
    constexprs: dict[str, object] = {
        "HEADS": heads,
        "HEAD_DIM": HEAD_DIM,
        "BLOCK_H": config.block_h,
        "BLOCK_N": config.block_n,
    }
    kernel = prefill_kernel
    if config.parts:
        kernel = prefill_gluon.prefill_kernel
        constexprs |= {"PARTS": config.parts, "STAGES": config.num_stages}
    else:
        constexprs["KEYS_FIRST"] = config.keys_first
    return CompileCase(
        label=f"prefill heads={heads}"
        + (" gluon" if config.parts else "")
        + (" lse" if lse else ""),
        kernel=kernel,
        signature={**_SIGNATURE, "lse_ptr": "*fp32"} if lse else _SIGNATURE,
        constexprs=constexprs if lse else {**constexprs, "lse_ptr": None},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        instructions=("HMMA.16816.F32.BF16",),
        divisible_by_16=_DIVISIBLE_BY_16,
        configuration=config,
    )
