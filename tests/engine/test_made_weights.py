"""The made weights: formats, and the variance that a linear of them keeps."""

import math
import zlib

import pytest
import torch

import made_weights
from flash_config import COMPRESS_RATIOS, flash_config

_E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def made(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float8_e8m0fnu:
        parameter = torch.zeros(shape, dtype=torch.uint8).view(dtype)
    elif dtype.is_floating_point and dtype.itemsize > 1:
        parameter = torch.full(shape, math.nan, dtype=dtype)
    else:
        parameter = torch.zeros(shape, dtype=dtype)
    made_weights.make_parameter(name, parameter)
    return parameter


def test_an_fp8_linear_keeps_the_variance():
    weight = made("layers.0.wq_b.weight", (256, 1024), torch.float8_e4m3fn).float()
    scale = made("layers.0.wq_b.weight_scale_inv", (2, 8), torch.float8_e8m0fnu)
    exponent = scale.view(torch.uint8).double() - 127
    whole = weight.double() * torch.exp2(exponent).repeat_interleave(128, 0).repeat_interleave(
        128, 1
    )
    assert whole.std().item() == pytest.approx(1 / math.sqrt(1024), rel=0.45)
    assert not weight.isnan().any()


def test_an_mxfp4_expert_keeps_the_variance():
    packed = made("experts.w2_weight", (2, 64, 512), torch.uint8)
    scale = made("experts.w2_weight_scale", (2, 64, 32), torch.uint8)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    sign = 1 - 2 * (codes >> 3).double()
    value = torch.tensor(_E2M1, dtype=torch.float64)[(codes & 7).long()] * sign
    whole = value * torch.exp2(scale.double() - 127).repeat_interleave(32, -1)
    assert whole.std().item() == pytest.approx(1 / math.sqrt(1024), rel=0.45)
    assert scale.unique().numel() == 2


def test_the_routing_table_names_distinct_experts():
    table = made("gate.tid2eid", (1000, 6), torch.int32)
    assert table.min() >= 0
    assert table.max() < 256
    assert all(len(set(row)) == 6 for row in table.tolist())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("norm.weight", (64,)),
        ("embed_tokens.weight", (32, 64)),
        ("lm_head.weight", (32, 64)),
        ("attn.attn_sink", (64,)),
        ("compressor.ape", (4, 64)),
        ("hc_attn_fn", (24, 256)),
        ("hc_attn_base", (24,)),
        ("hc_attn_scale", (3,)),
    ],
)
def test_values_follow_from_the_name_alone(name, shape):
    first = made(name, shape, torch.float32)
    torch.manual_seed(zlib.crc32(b"something else"))
    assert torch.equal(first, made(name, shape, torch.float32))
    assert first.isfinite().all()
    if name != "hc_attn_scale":
        assert not torch.equal(first, made("other." + name, shape, torch.float32))


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="layers.0.counter: torch.int64"):
        made("layers.0.counter", (3,), torch.int64)


def test_the_model_has_every_kind_of_layer():
    config = flash_config()
    assert set(COMPRESS_RATIOS) == {0, 4, 128}
    assert len(config["compress_ratios"]) == config["num_hidden_layers"] + 1


def test_few_tokens_can_be_answered():
    head = torch.full((32, 64), math.nan)
    made_weights.make_parameter("lm_head.weight", head, lively_tokens=8)
    assert torch.equal(head[6:10], -head[2:6])
    assert (head[2:10] != 0).all()
    assert not head[:2].any() and not head[10:].any()
    # Whatever the hidden state, some lively token is likelier than all others.
    hidden = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert (head @ hidden)[2:10].max() > 0


@pytest.mark.parametrize("number", [0, 3])
def test_an_odd_number_of_tokens_is_refused(number):
    with pytest.raises(ValueError, match=f"lively_tokens: {number}, allowed: even"):
        made_weights.make_parameter("norm.weight", torch.zeros(4), number)
