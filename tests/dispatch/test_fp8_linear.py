"""FP8 block linears: E8M0 scales before the CUTLASS kernel, and DeepGEMM left out."""

from __future__ import annotations

import math
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

EXPONENT_BYTES = [0, 1, 127, 254]
POWERS_OF_TWO = [math.ldexp(1.0, byte - 127) for byte in EXPONENT_BYTES]


def e8m0_scale() -> torch.Tensor:
    return torch.tensor([EXPONENT_BYTES] * 2, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def loaded_layer(name: str, scale: torch.Tensor) -> torch.nn.Module:
    """A linear layer as the FP8 weight loader leaves it: 256 rows, 512 columns."""
    layer = torch.nn.Module()
    weight = torch.ones(256, 512).to(torch.float8_e4m3fn)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.register_parameter(name, torch.nn.Parameter(scale, requires_grad=False))
    return layer


def process(layer: torch.nn.Module) -> None:
    from vllm.model_executor.kernels.linear.scaled_mm import cutlass

    # The constructor builds a quantiser that needs a GPU; this method does not use it.
    kernel = object.__new__(cutlass.CutlassFp8BlockScaledMMKernel)
    kernel.process_weights_after_loading(layer)


@pytest.mark.operation("fp8_linear")
@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
def test_e8m0_scales_become_float32_on_the_portable_path_alone(portable, name):
    layer = loaded_layer(name, e8m0_scale())
    weight = layer.weight.data.view(torch.uint8).clone()
    process(layer)
    scale = getattr(layer, name)
    if portable:
        assert scale.dtype == torch.float32
        # Exact, the subnormal 2**-127 too, which arithmetic may flush to zero.
        assert scale.double().tolist() == [POWERS_OF_TWO] * 2
        assert isinstance(scale, torch.nn.Parameter)
        assert scale.is_contiguous()
    else:
        assert scale.dtype == torch.float8_e8m0fnu
        assert scale.view(torch.uint8).tolist() == [EXPONENT_BYTES] * 2
    other = {"weight_scale_inv", "weight_scale"} - {name}
    assert not hasattr(layer, other.pop())
    assert torch.equal(layer.weight.data.view(torch.uint8), weight)


@pytest.mark.operation("fp8_linear")
@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
def test_float32_scales_are_left_alone_on_both_paths(portable, name):
    del portable
    values = torch.tensor([[0.3, 1e-40, 7.0, -2.5]] * 2)
    layer = loaded_layer(name, values)
    process(layer)
    scale = getattr(layer, name)
    assert scale.dtype == torch.float32
    assert scale.data_ptr() == values.data_ptr()
    assert torch.equal(scale.data, torch.tensor([[0.3, 1e-40, 7.0, -2.5]] * 2))


def test_a_layer_without_scales_is_left_alone(cuda):
    from vllm_sm12x.adapters.fp8_linear import upcast_e8m0_block_scale

    layer = torch.nn.Linear(4, 4)
    before = dict(layer.named_parameters())
    upcast_e8m0_block_scale(layer)
    assert dict(layer.named_parameters()).keys() == before.keys()


@pytest.fixture
def deep_gemm_installed(cuda, monkeypatch):
    from vllm.utils import deep_gemm

    monkeypatch.setattr(deep_gemm, "has_deep_gemm", lambda: True)
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "1")


@pytest.mark.operation("fp8_linear")
def test_deep_gemms_kernel_is_offered_as_upstream_offers_it(deep_gemm_installed, case, portable):
    from vllm.model_executor.kernels.linear.scaled_mm.deep_gemm import (
        DeepGemmFp8BlockScaledMMKernel,
    )

    supported, reason = DeepGemmFp8BlockScaledMMKernel.is_supported()
    if case.capability[0] == 12:
        assert (supported, reason) == (
            False,
            "Currently, only Hopper and Blackwell GPUs are supported.",
        )
    elif portable:
        assert not supported
        assert "portable" in reason
    else:
        assert (supported, reason) == (True, None)


def block_fp8_kernel() -> str:
    """Name of the kernel that vLLM chooses for a linear of 128 x 128 blocks."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        kFp8Dynamic128Sym,
        kFp8Static128BlockSym,
    )

    config = linear.FP8ScaledMMLinearLayerConfig(
        weight_quant_key=kFp8Static128BlockSym,
        activation_quant_key=kFp8Dynamic128Sym,
        weight_shape=(1024, 4096),
        input_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
    )
    chosen = linear.choose_scaled_mm_linear_kernel(config, linear._POSSIBLE_FP8_BLOCK_KERNELS)
    return chosen.__name__


@pytest.mark.operation("fp8_linear")
@pytest.mark.parametrize("flashinfer", [False, True])
def test_the_kernel_that_vllm_chooses(deep_gemm_installed, case, portable, flashinfer, monkeypatch):
    from vllm.model_executor.kernels.linear.scaled_mm import deep_gemm
    from vllm.model_executor.kernels.linear.scaled_mm.flashinfer import (
        FlashInferFp8BlockScaledMMKernel,
    )

    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(model_type="deepseek_v4"))
    )
    monkeypatch.setattr(deep_gemm, "get_current_vllm_config", lambda: config)
    # FlashInfer's kernel runs on SM90 alone and comes as a pair with DeepGEMM's.
    offered = flashinfer and case.capability == (9, 0)
    reason = None if offered else "not here"
    monkeypatch.setattr(
        FlashInferFp8BlockScaledMMKernel, "is_supported", lambda *_: (offered, reason)
    )
    monkeypatch.setattr(
        FlashInferFp8BlockScaledMMKernel, "can_implement", lambda *_: (offered, reason)
    )
    if portable or case.capability[0] == 12:
        expected = "CutlassFp8BlockScaledMMKernel"
    elif offered:
        expected = "FlashInferFp8DeepGEMMDynamicBlockScaledKernel"
    else:
        expected = "DeepGemmFp8BlockScaledMMKernel"
    assert block_fp8_kernel() == expected


@pytest.mark.operation("fp8_linear")
def test_the_warm_up_of_deep_gemm_skips_portable_linears(portable, monkeypatch):
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
    from vllm.model_executor.warmup import deep_gemm_warmup

    alignment = Mock(return_value=[128, 128])
    monkeypatch.setattr(deep_gemm_warmup, "get_mk_alignment_for_contiguous_layout", alignment)
    method = object.__new__(Fp8LinearMethod)
    method.block_quant, method.use_marlin = True, False
    method.quant_config = SimpleNamespace(weight_block_size=[128, 128])
    layer = object.__new__(LinearBase)
    torch.nn.Module.__init__(layer)
    layer.quant_method = method
    layer.weight = torch.nn.Parameter(
        torch.zeros(256, 512).to(torch.float8_e4m3fn), requires_grad=False
    )
    layer.weight_scale_inv = torch.nn.Parameter(torch.ones(2, 4), requires_grad=False)

    assert deep_gemm_warmup._fp8_linear_may_use_deep_gemm(layer) is not portable
    # Asking DeepGEMM for its alignment already fails where it does not load.
    assert alignment.called is not portable
