"""The quantisers, against decoders that know the formats by their bits, and hand-made cases."""

import math

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from tests.checkpoint.formats import quantize_fp8_blocks, quantize_mxfp4


def e4m3(byte: int) -> float:
    """An e4m3fn value from its bits: one of sign, four of exponent (bias 7), three of mantissa."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def e2m1(code: int) -> float:
    """An e2m1 value from its bits: one of sign, two of exponent (bias 1), one of mantissa."""
    sign = -1.0 if code & 8 else 1.0
    exponent, mantissa = (code >> 1) & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (2 + mantissa) * 2.0 ** (exponent - 2))


E4M3 = torch.tensor([e4m3(byte) for byte in range(256)], dtype=torch.float64)
E2M1 = torch.tensor([e2m1(code) for code in range(16)], dtype=torch.float64)


def power(scales: torch.Tensor) -> torch.Tensor:
    return torch.exp2(scales.view(torch.uint8).double() - 127)


def decode_fp8(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    whole = E4M3[values.view(torch.uint8).long()]
    return whole * power(scales).repeat_interleave(128, 0).repeat_interleave(128, 1)


def decode_mxfp4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    packed = codes.view(torch.uint8).long()
    whole = E2M1[torch.stack((packed % 16, packed // 16), -1).flatten(-2)]
    return whole * power(scales).repeat_interleave(32, 1)


def drawn(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.exp2(torch.randint(-20, 20, (rows, columns // 32), generator=generator))
    return torch.randn(rows, columns, generator=generator) * magnitude.repeat_interleave(32, 1)


def test_fp8_rounds_to_nearest_within_each_block():
    weight = drawn(256, 384, seed=1)
    values, scales = quantize_fp8_blocks(weight)
    assert values.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float8_e8m0fnu
    assert scales.shape == (2, 3)
    step = power(scales).repeat_interleave(128, 0).repeat_interleave(128, 1)
    error = (decode_fp8(values, scales) - weight.double()).abs()
    # Half a unit in the last of three places, or half of the smallest subnormal.
    assert (error <= torch.maximum(weight.double().abs() * 2.0**-4, step * 2.0**-10)).all()


def test_mxfp4_takes_the_nearest_value():
    weight = drawn(64, 256, seed=2)
    codes, scales = quantize_mxfp4(weight)
    assert codes.dtype == torch.int8
    assert codes.shape == (64, 128)
    assert scales.shape == (64, 8)
    step = power(scales).repeat_interleave(32, 1)
    nearest = (weight.double()[..., None] - step[..., None] * E2M1).abs().amin(-1)
    error = (decode_mxfp4(codes, scales) - weight.double()).abs()
    assert torch.equal(error, nearest)


@pytest.mark.parametrize(
    ("quantize", "size", "limit"), [(quantize_fp8_blocks, 128, 448.0), (quantize_mxfp4, 32, 6.0)]
)
@pytest.mark.parametrize("exponent", [-30, 0, 13])
def test_the_scale_is_the_least_that_does_not_saturate(quantize, size, limit, exponent):
    def scale_of(largest: float) -> float:
        weight = torch.zeros(128, 128)
        weight[0, size - 1] = -largest
        return power(quantize(weight)[1])[0, 0].item()

    assert scale_of(limit * 2.0**exponent) == 2.0**exponent
    above = torch.nextafter(torch.tensor(limit * 2.0**exponent), torch.tensor(math.inf)).item()
    assert scale_of(above) == 2.0 ** (exponent + 1)


def test_zeros_stay_zeros():
    for quantize, decode in ((quantize_fp8_blocks, decode_fp8), (quantize_mxfp4, decode_mxfp4)):
        assert (decode(*quantize(torch.zeros(128, 128))) == 0).all()


def test_mxfp4_bytes_by_hand():
    row = torch.zeros(1, 32)
    # 0.25 and 2.5 lie between two values: the even code. 0.75, 3.5 and 5 go up for it.
    row[0, :8] = torch.tensor([6.0, -0.5, 0.25, 0.75, 2.5, 3.5, 5.0, -1.5])
    codes, scales = quantize_mxfp4(row)
    assert scales.view(torch.uint8).tolist() == [[127]]
    assert codes.view(torch.uint8)[0, :4].tolist() == [0x97, 0x20, 0x64, 0xB6]


@pytest.mark.parametrize(
    ("quantize", "shape"), [(quantize_fp8_blocks, (256, 128)), (quantize_mxfp4, (48, 96))]
)
def test_transformers_decodes_the_same(quantize, shape):
    weight = drawn(*shape, seed=3)
    values, scales = quantize(weight)
    decode = decode_fp8 if quantize is quantize_fp8_blocks else decode_mxfp4
    theirs = Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32)
    assert torch.equal(theirs.double(), decode(values, scales))


def test_our_kernels_reference_decodes_the_same():
    from vllm_sm12x.ops.mxfp4_experts import dequantize_mxfp4

    codes, scales = quantize_mxfp4(drawn(48, 96, seed=4))
    ours = dequantize_mxfp4(codes.view(torch.uint8), scales, torch.float32)
    assert torch.equal(ours.double(), decode_mxfp4(codes, scales))


@pytest.mark.parametrize(
    ("quantize", "weight", "message"),
    [
        (quantize_fp8_blocks, torch.zeros(128, 100), r"shape \(128, 100\), allowed: multiples of"),
        (quantize_fp8_blocks, torch.zeros(64, 128), r"shape \(64, 128\)"),
        (quantize_mxfp4, torch.zeros(4, 48), r"shape \(4, 48\)"),
        (quantize_mxfp4, torch.zeros(4, 2, 32), r"shape \(4, 2, 32\)"),
        (quantize_mxfp4, torch.full((4, 32), math.nan), "not finite"),
    ],
)
def test_what_cannot_be_quantised_is_an_error(quantize, weight, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight)
