"""Cache pages byte by byte, from the layouts' descriptions and not from the code under test.

Formats: e4m3 is sign, 4 exponent bits with bias 7, 3 fraction bits, no infinities, NaN where all
seven low bits are set. E8M0 is ``2**(byte - 127)``, NaN at 255. bfloat16 is the upper half of a
float32. Everything is little-endian.
"""

from __future__ import annotations

import math
import struct

import torch


def e4m3_value(byte: int) -> float:
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, fraction = (byte >> 3) & 15, byte & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    if exponent == 0:
        return sign * fraction * 2.0**-9
    return sign * (8 + fraction) * 2.0 ** (exponent - 10)


def e8m0_value(byte: int) -> float:
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


E4M3 = torch.tensor([e4m3_value(byte) for byte in range(256)], dtype=torch.float64)
E8M0 = torch.tensor([e8m0_value(byte) for byte in range(256)], dtype=torch.float64)
E4M3_NAN = (0x7F, 0xFF)


def bf16_bytes(value: float) -> bytes:
    """For values that bfloat16 holds exactly."""
    packed = struct.pack("<f", value)
    assert packed[:2] == b"\0\0", value
    return packed[2:]


def random_e4m3_bytes(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Every code but NaN, uint8."""
    codes = torch.tensor([byte for byte in range(256) if byte not in E4M3_NAN], dtype=torch.uint8)
    return codes[torch.randint(len(codes), shape, generator=generator)]


class LatentPages:
    """A cache of fp8_ds_mla pages. Every byte that is not written is 0xFF: NaN in each format."""

    def __init__(
        self, blocks: int, block_size: int, stride: int | None = None, untouched: bool = False
    ) -> None:
        used = block_size * 584
        self.block_size = block_size
        self.stride = -(-used // 576) * 576 if stride is None else stride
        size = (blocks - 1) * self.stride + used
        # `untouched` costs no memory where nothing is written, however large the cache is.
        self.bytes = torch.empty(size, dtype=torch.uint8)
        if not untouched:
            self.bytes.fill_(0xFF)
        self.cache = self.bytes.as_strided((blocks, block_size, 584), (self.stride, 584, 1))

    def _places(self, slot: int) -> tuple[slice, slice, slice]:
        page = slot // self.block_size * self.stride
        offset = slot % self.block_size
        data = page + offset * 576
        scale = page + self.block_size * 576 + offset * 8
        return slice(data, data + 448), slice(data + 448, data + 576), slice(scale, scale + 7)

    def write(self, slot: int, nope: torch.Tensor, exponents: torch.Tensor, rope: torch.Tensor):
        """``nope`` uint8 [448], ``exponents`` uint8 [7], ``rope`` bfloat16 [64]."""
        values, rotated, scales = self._places(slot)
        self.bytes[values] = nope
        self.bytes[rotated] = rope.contiguous().view(torch.uint8)
        self.bytes[scales] = exponents

    def write_random(self, slot: int, generator: torch.Generator, magnitude: float = 1.0) -> None:
        """A token of about this magnitude, each group of 64 with its own."""
        latent = torch.randn(512, generator=generator) * magnitude
        nope = torch.empty(448, dtype=torch.uint8)
        exponents = torch.empty(7, dtype=torch.uint8)
        for group in range(7):
            part = latent[group * 64 : group * 64 + 64] * 2.0 ** (group % 3 - 1)
            exponent = math.ceil(math.log2(max(part.abs().max().item(), 1e-4) / 448.0))
            exponents[group] = exponent + 127
            scaled = (part / 2.0**exponent).to(torch.float8_e4m3fn)
            nope[group * 64 : group * 64 + 64] = scaled.view(torch.uint8)
        self.write(slot, nope, exponents, latent[448:].bfloat16())

    def read(self, slot: int) -> torch.Tensor:
        """float64 [512]."""
        values, rotated, scales = self._places(slot)
        nope = E4M3[self.bytes[values].int()]
        scale = E8M0[self.bytes[scales].int()]
        low_high = self.bytes[rotated].tolist()
        rope = [
            struct.unpack("<f", bytes((0, 0, low_high[i], low_high[i + 1])))[0]
            for i in range(0, 128, 2)
        ]
        return torch.cat(
            [nope * scale.repeat_interleave(64), torch.tensor(rope, dtype=torch.float64)]
        )


class IndexerPages:
    """A cache of indexer key pages (64 x 132 bytes). Unwritten bytes are 0xFF, NaN."""

    def __init__(self, blocks: int, stride: int = 8640, untouched: bool = False) -> None:
        self.stride = stride
        self.bytes = torch.empty((blocks - 1) * stride + 8448, dtype=torch.uint8)
        if not untouched:
            self.bytes.fill_(0xFF)
        self.cache = self.bytes.as_strided((blocks, 64, 1, 132), (stride, 132, 132, 1))

    def write(self, page: int, offset: int, key: torch.Tensor, scale: float) -> None:
        """``key`` uint8 [128]."""
        first = page * self.stride
        self.bytes[first + offset * 128 : first + offset * 128 + 128] = key
        place = first + 64 * 128 + offset * 4
        packed = struct.pack("<f", scale)
        self.bytes[place : place + 4] = torch.tensor(list(packed), dtype=torch.uint8)

    def read(self, page: int, offset: int) -> tuple[torch.Tensor, float]:
        """Key, float64 [128], and its scale."""
        first = page * self.stride
        key = E4M3[self.bytes[first + offset * 128 : first + offset * 128 + 128].int()]
        place = first + 64 * 128 + offset * 4
        (scale,) = struct.unpack("<f", bytes(self.bytes[place : place + 4].tolist()))
        return key, scale
