import itertools
import math

import pytest
import torch
from capture import record

from vllm_sm12x.ops.ue8m0 import scale_blocks_, ue8m0_to_float32

BYTES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_every_byte_is_its_power_of_two(dtype):
    decoded = ue8m0_to_float32(BYTES.view(dtype))
    assert decoded.dtype == torch.float32
    for byte in range(255):
        assert decoded[byte].item() == math.ldexp(1.0, byte - 127)
    assert decoded[255].isnan()


def test_torch_decodes_alike():
    theirs = BYTES.view(torch.float8_e8m0fnu).to(torch.float64)
    ours = ue8m0_to_float32(BYTES).double()
    assert torch.equal(ours[:255], theirs[:255]) and theirs[255].isnan()


def test_the_subnormal_survives_flushed_arithmetic():
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        bits = ue8m0_to_float32(BYTES[:2]).view(torch.int32)
    finally:
        torch.set_flush_denormal(False)
    assert bits.tolist() == [0x00400000, 0x00800000]


def test_shape_and_strides_are_free():
    scale = torch.randint(0, 255, (6, 5, 4), dtype=torch.uint8).permute(2, 0, 1)[::2]
    decoded = ue8m0_to_float32(scale)
    assert torch.equal(decoded.double(), torch.exp2(scale.double() - 127))
    assert ue8m0_to_float32(BYTES[:0]).shape == (0,)
    assert ue8m0_to_float32(BYTES[128]).item() == 2.0


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (
            torch.ones(2),
            r"scale: dtype torch\.float32, allowed: .*float8_e8m0fnu.*uint8",
        ),
        (torch.ones(2, dtype=torch.int32), "scale: dtype torch.int32, allowed"),
        ([127], "scale: expected a tensor, got list"),
    ],
)
def test_bad_scale_is_named(scale, message):
    with pytest.raises(ValueError, match=message):
        ue8m0_to_float32(scale)


@pytest.mark.parametrize(
    ("shape", "block_shape"),
    [
        ((3, 6), (2,)),
        ((3, 6), (3, 2)),
        ((2, 4, 6), (2, 3)),
        ((2, 4, 6), (1, 4, 3)),
        ((0, 6), (2,)),
    ],
)
def test_blocks_are_scaled_as_a_loop_does(shape, block_shape):
    values = torch.randn(shape, dtype=torch.float64)
    leading = len(shape) - len(block_shape)
    block = (1,) * leading + block_shape
    scale = torch.randn([size // b for size, b in zip(shape, block, strict=True)]).double()
    expected = torch.full_like(values, math.nan)
    for index in itertools.product(*map(range, shape)):
        of_block = tuple(i // b for i, b in zip(index, block, strict=True))
        expected[index] = values[index] * scale[of_block]
    result = scale_blocks_(values, scale, block_shape)
    assert result is values
    assert torch.equal(values, expected)


def test_blocks_of_strided_values_are_scaled_in_place():
    storage = torch.randn(6, 4, 3)
    before = storage.clone()
    values = storage.permute(2, 1, 0)
    scale = torch.randn(2, 3, 3).transpose(0, 1)
    scale_blocks_(values, scale, (2, 2))
    factors = scale.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(storage, before * factors.permute(2, 1, 0))


@pytest.mark.parametrize(
    ("values", "scale", "block_shape", "message"),
    [
        (
            (4, 6),
            (4, 2),
            (4,),
            "values: size 6 of dimension 1, allowed: multiples of 4",
        ),
        ((4, 6), (4, 3), (3,), r"scale: shape \(4, 3\), allowed: \(4, 2\)"),
        (
            (4, 6),
            (2, 4),
            (3, 2),
            r"values: size 4 of dimension 0, allowed: multiples of 3",
        ),
        ((4,), (2, 2), (2, 2), "values: 1 dimensions, allowed: at least 2"),
    ],
)
def test_bad_blocks_are_named(values, scale, block_shape, message):
    with pytest.raises(ValueError, match=message):
        scale_blocks_(torch.ones(values), torch.ones(scale), block_shape)


def test_capture_safe():
    def call(values, scale):
        return scale_blocks_(values, ue8m0_to_float32(scale), (4,))

    first = record(call, torch.ones(4, 256), BYTES.view(4, 64))
    assert first.calls == record(call, torch.zeros(4, 256), BYTES.view(4, 64).flip(1)).calls


@pytest.mark.gpu
def test_gpu_gives_the_same_bits():
    on_gpu = ue8m0_to_float32(BYTES.cuda())
    assert torch.equal(on_gpu.view(torch.int32).cpu(), ue8m0_to_float32(BYTES).view(torch.int32))
    # Products with the subnormal are not flushed either.
    values = torch.arange(8.0)
    scaled = scale_blocks_(values.cuda(), on_gpu[:1], (8,)).cpu()
    assert torch.equal(scaled.double(), values.double() * 2.0**-127)
