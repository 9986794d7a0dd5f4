"""fp8_ds_mla pages: layout, reading and writing."""

from __future__ import annotations

import math

import pytest
import torch
from capture import record
from pages import E4M3, LatentPages, bf16_bytes, random_e4m3_bytes

from vllm_sm12x.ops import fp8_ds_mla


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def read(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    out = torch.full((*slots.shape, 512), math.nan)
    fp8_ds_mla.dequantize_slots(cache, slots, out)
    return out


def test_sizes():
    assert (fp8_ds_mla.DATA_BYTES, fp8_ds_mla.SCALE_BYTES, fp8_ds_mla.TOKEN_BYTES) == (576, 8, 584)
    assert fp8_ds_mla.page_bytes(64) == 37440
    assert fp8_ds_mla.page_bytes(2) == 1728


def test_one_token_by_hand():
    # Two pages of two tokens, 1728 bytes apart; the token is the second of the second page.
    page = torch.zeros(2 * 1728, dtype=torch.uint8)
    data, scales = 1728 + 576, 1728 + 2 * 576 + 8
    page[data + 0] = 0x38  # 1.0
    page[data + 1] = 0xFE  # -448
    page[data + 2] = 0x01  # 2**-9, the smallest subnormal
    page[data + 64] = 0x38  # in the second group
    page[data + 447] = 0x40  # 2.0, in the last group
    page[data + 448 : data + 450] = torch.tensor(list(bf16_bytes(1.5)), dtype=torch.uint8)
    page[data + 574 : data + 576] = torch.tensor(list(bf16_bytes(-3.0)), dtype=torch.uint8)
    page[scales : scales + 7] = torch.tensor([128, 127, 127, 127, 127, 127, 120])
    page[scales + 7] = 99  # the unused byte
    cache = page.as_strided((2, 2, 584), (1728, 584, 1))
    expected = torch.zeros(512)
    expected[[0, 1, 2, 64, 447, 448, 511]] = torch.tensor(
        [2.0, -896.0, 2.0**-8, 1.0, 2.0**-6, 1.5, -3.0]
    )
    assert torch.equal(read(cache, torch.tensor([3]))[0], expected)


@pytest.mark.parametrize(("block_size", "stride"), [(64, None), (2, None), (2, 1168), (64, 40000)])
def test_reading_equals_the_byte_level_reader(block_size, stride):
    generator = rng(1)
    pages = LatentPages(5, block_size, stride)
    slots = torch.randperm(5 * block_size, generator=generator)[:8]
    for slot in slots.tolist():
        pages.write(
            slot,
            random_e4m3_bytes(448, generator=generator),
            torch.randint(40, 200, (7,), generator=generator).to(torch.uint8),
            torch.randn(64, generator=generator).bfloat16(),
        )
    for dtype in (torch.int32, torch.int64):
        actual = read(pages.cache, slots.to(dtype).view(2, 4))
        expected = torch.stack([pages.read(slot) for slot in slots.tolist()]).view(2, 4, 512)
        assert torch.equal(actual.double(), expected)


def test_scales_at_both_ends():
    pages = LatentPages(1, 2)
    nope = torch.zeros(448, dtype=torch.uint8)
    nope[0::64] = 0x38  # 1.0
    nope[1::64] = 0x01  # 2**-9
    exponents = torch.tensor([0, 1, 2, 127, 253, 254, 255], dtype=torch.uint8)
    pages.write(1, nope, exponents, torch.zeros(64).bfloat16())
    actual = read(pages.cache, torch.tensor([1]))[0].double()
    assert actual[0:384:64].tolist() == [2.0 ** (e - 127) for e in (0, 1, 2, 127, 253, 254)]
    assert actual[1:384:64].tolist() == [2.0 ** (e - 136) for e in (0, 1, 2, 127, 253, 254)]
    # E8M0 defines 255 as NaN.
    assert actual[384:448].isnan().all()
    assert not actual[:384].isnan().any()


def test_what_exceeds_float32_is_infinite():
    pages = LatentPages(1, 2)
    nope = torch.full((448,), 0x7E, dtype=torch.uint8)  # 448
    pages.write(0, nope, torch.full((7,), 254, dtype=torch.uint8), torch.zeros(64).bfloat16())
    assert read(pages.cache, torch.tensor([0]))[0, :448].eq(math.inf).all()


def test_slots_outside_the_cache_read_as_zeros():
    # Every byte of the cache is 0xFF, NaN.
    pages = LatentPages(3, 2)
    outside = torch.tensor([-1, -(2**31), 6, 7, 2**31 - 1], dtype=torch.int32)
    assert torch.equal(read(pages.cache, outside), torch.zeros(5, 512))
    assert read(pages.cache, torch.tensor([5])).isnan().all()


def test_an_empty_cache_reads_as_zeros():
    cache = torch.empty(0, 64, 584, dtype=torch.uint8)
    assert torch.equal(read(cache, torch.tensor([0, -1])), torch.zeros(2, 512))


@pytest.mark.parametrize(("block_size", "blocks"), [(64, 57_400), (2, 1_243_000)])
def test_byte_offsets_beyond_two_to_the_31(block_size, blocks):
    pages = LatentPages(blocks, block_size, untouched=True)
    slot = blocks * block_size - 1
    assert slot // block_size * pages.stride > 2**31
    pages.write_random(slot, rng(2))
    actual = read(pages.cache, torch.tensor([slot], dtype=torch.int32))
    assert torch.equal(actual[0].double(), pages.read(slot))


def nearest_e4m3(value: float) -> int:
    """Code of the nearest finite e4m3 value, ties to the even code, by search."""
    codes = [byte for byte in range(256) if byte & 0x7F != 0x7F and (byte >> 7) == (value < 0)]
    return min(codes, key=lambda byte: (abs(E4M3[byte].item() - value), byte & 1))


@pytest.mark.parametrize("magnitude", [1e-6, 0.02, 1.0, 300.0])
def test_writing_quantises_as_defined(magnitude):
    latent = (torch.randn(3, 512, generator=rng(3)) * magnitude).bfloat16()
    latent[0, :64] = 0.0
    latent[1, 64:128] = 0.0
    latent[1, 70] = 448.0  # the scale is 1, exactly
    latent[1, 128] = 450.0  # one bfloat16 step more: the next scale
    pages = LatentPages(2, 64)
    slots = torch.tensor([5, 127, 64])
    fp8_ds_mla.quantize_to_slots(latent, pages.cache, slots)
    expected = LatentPages(2, 64)
    for token, slot in enumerate(slots.tolist()):
        nope, exponents = torch.empty(448, dtype=torch.uint8), torch.empty(7, dtype=torch.uint8)
        for group in range(7):
            part = latent[token, group * 64 : group * 64 + 64].double()
            amax = max(part.abs().max().item(), 1e-4)
            exponent = -126
            while 448.0 * 2.0**exponent < amax:
                exponent += 1
            exponents[group] = exponent + 127
            for i, value in enumerate(part.tolist()):
                nope[group * 64 + i] = nearest_e4m3(value / 2.0**exponent)
        expected.write(slot, nope, exponents, latent[token, 448:])
        expected.bytes[slot // 64 * 37440 + 64 * 576 + slot % 64 * 8 + 7] = 0
    values = E4M3[pages.bytes.int()].nan_to_num(nan=1e9)
    # Codes of zero with either sign are the same number.
    assert torch.equal(values, E4M3[expected.bytes.int()].nan_to_num(nan=1e9))
    changed = pages.bytes != expected.bytes
    assert pages.bytes[changed].bitwise_and(0x7F).eq(0).all()


def test_what_was_written_is_read_back_within_the_format():
    latent = torch.randn(50, 512, generator=rng(4))
    pages = LatentPages(1, 64)
    slots = torch.randperm(64, generator=rng(5))[:50]
    fp8_ds_mla.quantize_to_slots(latent, pages.cache, slots)
    actual = read(pages.cache, slots)
    rounded = latent.bfloat16().float()
    assert torch.equal(actual[:, 448:], rounded[:, 448:])
    # A half step of e4m3: 2**-4 of the value, or of the smallest normal at the group's scale.
    scale = rounded[:, :448].unflatten(1, (7, 64)).abs().amax(2, keepdim=True) / 448.0 * 2
    floor = (scale * 2.0**-10).expand(-1, -1, 64).flatten(1)
    error = (actual[:, :448] - rounded[:, :448]).abs()
    assert (error <= torch.maximum(rounded[:, :448].abs() * 2.0**-4, floor)).all()


def test_reading_and_writing_are_safe_under_capture():
    pages = LatentPages(3, 64)
    slots = torch.tensor([0, 64, 191])
    record(fp8_ds_mla.quantize_to_slots, torch.randn(3, 512), pages.cache, slots)
    record(fp8_ds_mla.dequantize_slots, pages.cache, slots, torch.empty(3, 512))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": torch.zeros(2, 64, 576, dtype=torch.uint8)}, "cache: shape .*584"),
        ({"cache": torch.zeros(2, 64, 584)}, "cache: dtype torch.float32, allowed: torch.uint8"),
        (
            {
                "cache": torch.zeros(80000, dtype=torch.uint8).as_strided(
                    (2, 64, 584), (37377, 584, 1)
                )
            },
            r"cache: stride\(0\) is 37377, allowed: multiples of 8 from 37376 on",
        ),
        (
            {
                "cache": torch.zeros(80000, dtype=torch.uint8).as_strided(
                    (2, 64, 584), (37368, 584, 1)
                )
            },
            r"cache: stride\(0\) is 37368",
        ),
        (
            {"cache": torch.zeros(2, 64, 600, dtype=torch.uint8)[..., :584]},
            r"cache: stride\(1\) is 600, allowed: 584",
        ),
        (
            {"cache": torch.zeros(74756, dtype=torch.uint8)[4:].view(2, 64, 584)},
            "cache: storage offset 4, allowed: multiples of 8",
        ),
        ({"slots": torch.zeros(3)}, "slots: dtype torch.float32"),
        ({"out": torch.zeros(3, 511)}, "out: shape"),
        ({"out": torch.zeros(3, 512).double()}, "out: dtype"),
        ({"out": torch.zeros(512, 3).t()}, "out: strides"),
        ({"out": torch.zeros(3, 512, device="meta")}, "out: device meta, allowed: cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "cache": torch.zeros(2, 64, 584, dtype=torch.uint8),
        "slots": torch.zeros(3, dtype=torch.int64),
        "out": torch.zeros(3, 512),
    }
    fp8_ds_mla.dequantize_slots(**arguments)
    with pytest.raises(ValueError, match=message):
        fp8_ds_mla.dequantize_slots(**{**arguments, **change})
