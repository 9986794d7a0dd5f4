"""MXFP4 experts as a backend of vLLM's oracle, under the name ``sm12x``.

The environment variable ``SM12X_EXPERT_ACTIVATIONS`` says in which format they take activations:
``bfloat16``, which is exact and the default, or ``float8``, which rounds those of prompts to e4m3.
"""

from __future__ import annotations

import functools
import os

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey, kMxfp4Static
from vllm.platforms import current_platform

from vllm_sm12x import settings
from vllm_sm12x.ops.mxfp4_experts import Activations, mxfp4_experts

ENV = "SM12X_EXPERT_ACTIVATIONS"

SETTINGS = ("auto", "bfloat16", "float8")


def parse_setting(value: str) -> Activations:
    """The format that ``SM12X_EXPERT_ACTIVATIONS=value`` means; auto and an empty value: bfloat16.

    Raises:
        ValueError: It is none of :data:`SETTINGS`.
    """
    return "float8" if settings.choice(ENV, value, SETTINGS) == "float8" else "bfloat16"


@functools.cache
def expert_activations() -> Activations:
    """The format that this process uses. Read once."""
    return parse_setting(os.environ.get(ENV, "auto"))


class SM12xMxfp4Experts(mk.FusedMoEExpertsModular):
    """Routed experts on the checkpoint's own MXFP4 layout.

    ``w1`` is uint8 ``[E, 2I, H / 2]`` (gate rows, then up rows), ``w2`` uint8 ``[E, H, I / 2]``;
    the scales are uint8 E8M0 exponents, one for 32 values along the last dimension.

    Raises:
        ValueError: The layer has a bias; DeepSeek V4's experts have none.
    """

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
        max_num_tokens: int | None = None,
        num_dispatchers: int | None = None,
    ) -> None:
        if quant_config.w1_bias is not None or quant_config.w2_bias is not None:
            raise ValueError(
                "w1_bias, w2_bias: the sm12x MXFP4 experts have no bias, allowed: None"
            )
        super().__init__(moe_config, quant_config, max_num_tokens, num_dispatchers)
        self.activations = expert_activations()

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cuda()

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(
        weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        return weight_key == kMxfp4Static and activation_key is None

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation == MoEActivation.SILU

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return not (
            moe_parallel_config.use_fi_nvl_two_sided_kernels
            or moe_parallel_config.use_fi_nvl_one_sided_kernels
        )

    def supports_expert_map(self) -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        # `apply` weights and sums itself.
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (0,), (0,), (M, K)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        mxfp4_experts(
            hidden_states,
            w1,
            self.w1_scale,
            w2,
            self.w2_scale,
            topk_weights,
            topk_ids,
            output,
            swiglu_limit=self.quant_config.gemm1_clamp_limit,
            apply_router_weight_on_input=apply_router_weight_on_input,
            expert_map=expert_map,
            align=moe_align_block_size,
            activations=self.activations,
        )


# A bad value stops whatever imports this, before a model is loaded.
parse_setting(os.environ.get(ENV, "auto"))
