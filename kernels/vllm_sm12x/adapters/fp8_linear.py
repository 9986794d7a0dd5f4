"""FP8 block linears: the weight scales as the CUTLASS kernel wants them.

The checkpoint stores block scales as E8M0 exponents. vLLM 0.22.1 turns them into float32 for
DeepGEMM alone; CUTLASS refuses the exponent dtype.
"""

from __future__ import annotations

import torch
from vllm.model_executor.utils import replace_parameter

from vllm_sm12x.ops.ue8m0 import ue8m0_to_float32

_SCALE_NAMES = ("weight_scale_inv", "weight_scale")


def upcast_e8m0_block_scale(layer: torch.nn.Module) -> None:
    """Replace a layer's E8M0 block scales, if it has any, by float32 ones of the same shape.

    Args:
        layer: A linear layer after loading. ``weight_scale_inv`` (or ``weight_scale``) is
            ``[ceil(N / 128), ceil(K / 128)]``, float8_e8m0fnu or float32; float32 is left alone.
    """
    for name in _SCALE_NAMES:
        scale = getattr(layer, name, None)
        if scale is not None and scale.dtype == torch.float8_e8m0fnu:
            replace_parameter(layer, name, ue8m0_to_float32(scale.data).contiguous())
