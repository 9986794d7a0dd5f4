"""What the compile gate compiles of this operation; see :mod:`vllm_sm12x.proof.case`."""

from __future__ import annotations

from vllm_sm12x.ops.sparse_mla import config_decode
from vllm_sm12x.ops.sparse_mla.compile_cases_decode import decode_cases
from vllm_sm12x.ops.sparse_mla.compile_cases_prefill import prefill_cases
from vllm_sm12x.ops.sparse_mla.config_prefill import PREFILL_TABLE
from vllm_sm12x.proof.case import CompileCase

TABLES = (config_decode.TABLE, config_decode.COMBINE, PREFILL_TABLE)


def cases() -> list[CompileCase]:
    """Cases of the decode kernels, then of the prefill kernel."""
    return [*decode_cases(), *prefill_cases()]
