"""The output projection's grouped einsum, and the format of the activation scales before it."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch


def operands() -> tuple[torch.Tensor, ...]:
    """Two tokens, two groups, 256 inputs, 128 outputs a group; small integers, hence exact."""
    generator = torch.Generator().manual_seed(3)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape, generator=generator).float()

    a = integers(2, 2, 256).to(torch.float8_e4m3fn)
    a_scale = torch.tensor([[[1.0, 0.5], [2.0, 0.25]], [[4.0, 1.0], [0.5, 8.0]]])
    b = integers(256, 256).to(torch.float8_e4m3fn)
    b_scale = torch.tensor([[1.0, 2.0], [0.5, 4.0]])
    out = torch.full((2, 2, 128), float("nan"), dtype=torch.bfloat16)
    return a, a_scale, b, b_scale, out


def definition(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor
) -> torch.Tensor:
    a = a.double() * a_scale.double().repeat_interleave(128, -1)
    scale = b_scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    b = (b.double() * scale).view(2, 128, 256)
    return torch.einsum("bhr,hdr->bhd", a, b)


@pytest.mark.operation("fp8_einsum")
def test_the_registered_op_takes_the_right_einsum(portable, monkeypatch):
    from vllm.models.deepseek_v4 import attention

    # The op's body reaches DeepGEMM through this name.
    native = Mock()
    monkeypatch.setattr(attention, "fp8_einsum", native)
    a, a_scale, b, b_scale, out = operands()
    result = attention.deepseek_v4_fp8_einsum(
        a, a_scale, b, b_scale, out, "bhr,hdr->bhd", [1, 128, 128]
    )
    assert result is None
    if portable:
        native.assert_not_called()
        expected = definition(a, a_scale, b, b_scale).to(torch.bfloat16)
        torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)
    else:
        native.assert_called_once_with(
            "bhr,hdr->bhd", (a, a_scale), (b, b_scale), out, recipe=(1, 128, 128)
        )
        assert out.isnan().all()


def wrapper(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The attention layer's constructor, with stand-ins for what needs a GPU or a whole model."""
    from vllm.models.deepseek_v4 import attention

    for name in (
        "QuantFP8",
        "RMSNorm",
        "DeepseekV4SWACache",
        "DeepseekV4MLAAttention",
        "DeepseekCompressor",
    ):
        monkeypatch.setattr(attention, name, Mock())
    monkeypatch.setattr(attention, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(torch.cuda, "Event", Mock())
    config = SimpleNamespace(rms_norm_eps=1e-6, qk_rope_head_dim=64, o_groups=8, o_lora_rank=1024)
    modules = Mock(
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(hf_config=config),
            compilation_config=SimpleNamespace(static_forward_context={}),
        )
    )
    return attention.DeepseekV4MultiHeadLatentAttentionWrapper(
        hidden_size=4096,
        num_heads=64,
        head_dim=512,
        scale=512**-0.5,
        qk_nope_head_dim=448,
        qk_rope_head_dim=64,
        v_head_dim=512,
        q_lora_rank=1024,
        kv_lora_rank=512,
        o_lora_rank=1024,
        mla_modules=modules,
        window_size=128,
        compress_ratio=1,
        cache_config=Mock(),
        prefix="model.layers.0.attn",
    )


@pytest.mark.operation("fp8_einsum")
def test_the_format_of_the_activation_scales(case, portable, monkeypatch):
    layer = wrapper(monkeypatch)
    # Upstream: SM90 takes float32 scales, everything above packed and TMA-aligned ones.
    packed = case.capability[0] >= 10 and not portable
    assert layer._einsum_recipe == ((1, 1, 128) if packed else (1, 128, 128))
    assert layer._tma_aligned_scales is packed
    # Both paths quantise the activations themselves.
    assert layer._wo_a_act_quant.use_deep_gemm_supported is False
