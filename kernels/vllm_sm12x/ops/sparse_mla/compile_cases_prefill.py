"""What the compile gate compiles of the prefill kernel: every row of its table for SM12x."""

from __future__ import annotations

from vllm_sm12x.ops.fp8_ds_mla.layout import HEAD_DIM
from vllm_sm12x.ops.sparse_mla import prefill_gluon
from vllm_sm12x.ops.sparse_mla.config_prefill import PREFILL_TABLE, PrefillConfig
from vllm_sm12x.ops.sparse_mla.prefill_kernel import prefill_kernel
from vllm_sm12x.proof.case import CompileCase, case_of_row, sm12x_rows

_TYPES = {
    "q_ptr": "*bf16",
    "kv_ptr": "*bf16",
    "indices_ptr": "*i32",
    "lens_ptr": "*i32",
    "sink_ptr": "*fp32",
    "out_ptr": "*bf16",
    "lse_ptr": "*fp32",
    "softmax_scale": "fp32",
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
    rows = sm12x_rows(PREFILL_TABLE)
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
    if not lse:
        constexprs["lse_ptr"] = None
    label = f"prefill heads={heads}" + " gluon" * bool(config.parts) + " lse" * lse
    return case_of_row(
        label,
        kernel,
        _TYPES,
        constexprs,
        config,
        instructions=("HMMA.16816.F32.BF16",),
        divisible_by_16=_DIVISIBLE_BY_16,
    )
