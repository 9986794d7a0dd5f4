"""Rotary tables of DeepSeek V4's layers: plain RoPE for window-only ones, YaRN for the others."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

# Ratios of the layers 0 to 3; layer 4 is the MTP block, which the list does not name.
RATIOS = [0, 4, 128, 1]
MTP = 4
WINDOW_ONLY = (0, 3, MTP)
POSITIONS, ORIGINAL, FACTOR = 2048, 128, 16
THETA, COMPRESS_THETA = 10000.0, 160000.0


def fresh_config() -> SimpleNamespace:
    return SimpleNamespace(
        hidden_size=64,
        num_attention_heads=2,
        q_lora_rank=32,
        o_lora_rank=32,
        head_dim=512,
        qk_rope_head_dim=64,
        o_groups=2,
        sliding_window=128,
        num_hidden_layers=len(RATIOS),
        compress_ratios=RATIOS,
        rms_norm_eps=1e-6,
        max_position_embeddings=POSITIONS,
        quantization_config={"scale_fmt": "ue8m0"},
        rope_scaling=None,
        rope_theta=THETA,
        compress_rope_theta=COMPRESS_THETA,
        rope_parameters={
            "rope_type": "yarn",
            "factor": FACTOR,
            "original_max_position_embeddings": ORIGINAL,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    )


@pytest.fixture
def build(cuda, monkeypatch):
    """Construct layers, in the order given, as the model does; gives their rotary modules."""
    from vllm.model_executor.layers import rotary_embedding
    from vllm.models.deepseek_v4.nvidia import model

    # Tables would be made on the GPU.
    monkeypatch.setattr(cuda, "device_type", "cpu")
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    for name in (
        "MergedColumnParallelLinear",
        "ColumnParallelLinear",
        "RowParallelLinear",
        "RMSNorm",
        "DeepseekV4Indexer",
        "DeepseekV4MLAModules",
        "DeepseekV4MultiHeadLatentAttentionWrapper",
    ):
        monkeypatch.setattr(model, name, MagicMock())
    monkeypatch.setattr(model, "get_tensor_model_parallel_world_size", lambda: 1)
    # What the rotary class asks of the engine's settings is not the subject here.
    monkeypatch.setattr(
        rotary_embedding.base.CustomOp, "dispatch_forward", lambda self, compile_native: None
    )
    monkeypatch.setattr(rotary_embedding.base.CustomOp, "enabled", classmethod(lambda cls: False))
    asked = {}

    def make(config: SimpleNamespace, order: list[int]) -> dict[int, torch.nn.Module]:
        vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(hf_config=config), quant_config=None, cache_config=None
        )
        rotary = {}
        for layer in order:

            def recording(*args, _layer=layer, **kwargs):
                asked[_layer] = copy.deepcopy(kwargs["rope_parameters"])
                return rotary_embedding.get_rope(*args, **kwargs)

            monkeypatch.setattr(model, "get_rope", recording)
            attention = model.DeepseekV4Attention(vllm_config, f"model.layers.{layer}.attn")
            rotary[layer] = attention.rotary_emb
            # The indexer of a layer and the attention share the module.
            modules = model.DeepseekV4MLAModules.call_args.kwargs
            assert modules["rotary_emb"] is modules["indexer_rotary_emb"] is rotary[layer]
        return rotary

    make.asked = asked
    return make


def frequencies(theta: float, yarn: bool) -> torch.Tensor:
    """Inverse frequencies of 64 rotary dimensions, in float64, by the definitions."""
    plain = theta ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    if not yarn:
        return plain

    def dimension(turns: float) -> float:
        # The dimension that makes this many turns over the original context.
        return 64 * math.log(ORIGINAL / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), 63)
    ramp = ((torch.arange(32, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return plain / FACTOR * ramp + plain * (1 - ramp)


def table(inverse: torch.Tensor, rows: int) -> torch.Tensor:
    angle = torch.arange(rows, dtype=torch.float64)[:, None] * inverse
    return torch.cat([angle.cos(), angle.sin()], -1)


# Window-only layers before, between and after compressed ones.
ORDERS = ([0, 1, 2, 3, MTP], [MTP, 3, 2, 1, 0], [1, 0, 2, MTP, 3])


@pytest.mark.operation("window_rope")
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_parameters_of_every_layer(portable, order, build):
    config = fresh_config()
    build(config, order)
    common = {
        "rope_type": "deepseek_yarn",
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0,
        "mscale_all_dim": 0,
        "is_deepseek_v4": True,
        "rope_dim": 64,
    }
    yarn = {"factor": FACTOR, "original_max_position_embeddings": ORIGINAL}
    plain = {"factor": 1.0, "original_max_position_embeddings": POSITIONS}
    for layer in order:
        expected = {**common, **yarn, "rope_theta": COMPRESS_THETA}
        if layer in WINDOW_ONLY:
            expected = {**common, **(plain if portable else yarn), "rope_theta": THETA}
        assert build.asked[layer] == expected, layer
    # The model's own settings keep their factor, whatever came last.
    assert config.rope_parameters["factor"] == FACTOR
    assert config.rope_parameters["original_max_position_embeddings"] == ORIGINAL


@pytest.mark.operation("window_rope")
def test_the_tables_equal_the_definitions(portable, build):
    rotary = build(fresh_config(), ORDERS[2])
    for layer, module in rotary.items():
        window = layer in WINDOW_ONLY
        plain = window and portable
        inverse = frequencies(THETA if window else COMPRESS_THETA, yarn=not plain)
        cache = module.cos_sin_cache
        assert cache.dtype == torch.float32
        assert cache.shape == (POSITIONS, 64)
        # Angles up to 2047 rad in float32 are off by at most 2047 * 2**-23 or so.
        torch.testing.assert_close(cache.double(), table(inverse, POSITIONS), rtol=0, atol=1e-3)
    # The two differ by far more inside the window, so the comparison can tell them apart.
    differ = table(frequencies(THETA, True), 128) - table(frequencies(THETA, False), 128)
    assert differ.abs().amax() > 0.1


def test_compressed_layers_have_the_very_same_tables_on_both_paths(build, choose, monkeypatch):
    from vllm.model_executor.layers import rotary_embedding

    tables = {}
    for override in ("none", "window_rope"):
        choose((9, 0), override)
        monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
        tables[override] = build(fresh_config(), ORDERS[0])
    for layer in (1, 2):
        native, ours = tables["none"][layer], tables["window_rope"][layer]
        assert native is not ours
        assert torch.equal(native.cos_sin_cache, ours.cos_sin_cache)
    assert type(tables["window_rope"][0]) is type(tables["none"][0])
