"""What a sparse decode with bfloat16 weights may be off by, and large caches made at once."""

from __future__ import annotations

import math

import torch
from pages import E4M3, E8M0, random_e4m3_bytes
from prefill_checks import check_token


def check_tokens(q, keys_of_token, sink, scale, out, lse) -> None:
    """Fail unless ``out`` and ``lse`` are right; ``keys_of_token[t]`` is float64 ``[n, 512]``."""
    sink = sink[: q.shape[1]]
    for t, keys in enumerate(keys_of_token):
        check_token(q[t], keys, sink, scale, out[t], None if lse is None else lse[t])


class FullPages:
    """A cache in which every token is random, and page 0 is NaN."""

    def __init__(self, blocks: int, block_size: int, generator: torch.Generator) -> None:
        stride = -(-block_size * 584 // 576) * 576
        self.block_size = block_size
        self.bytes = torch.full((blocks * stride,), 0xFF, dtype=torch.uint8)
        self.cache = self.bytes.as_strided((blocks, block_size, 584), (stride, 584, 1))
        self.data = self.bytes.as_strided((blocks, block_size, 576), (stride, 576, 1))
        self.scales = self.bytes.as_strided(
            (blocks, block_size, 8), (stride, 8, 1), block_size * 576
        )
        # Magnitudes about 1: codes of all sizes up to 448, and scales of 2**-9 to 2**-7.
        self.data[1:, :, :448] = random_e4m3_bytes(blocks - 1, block_size, 448, generator=generator)
        rotated = torch.randn(blocks - 1, block_size, 64, generator=generator).bfloat16()
        self.data[1:, :, 448:] = rotated.view(torch.uint8)
        exponents = torch.randint(118, 121, (blocks - 1, block_size, 7), generator=generator)
        self.scales[1:, :, :7] = exponents.to(torch.uint8)

    def slots(self) -> range:
        """Those with numbers in them."""
        return range(self.block_size, self.cache.shape[0] * self.block_size)

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """float64 ``[n, 512]``."""
        page, offset = slots.long() // self.block_size, slots.long() % self.block_size
        data, scales = self.data[page, offset], self.scales[page, offset, :7]
        nope = E4M3[data[:, :448].int()] * E8M0[scales.int()].repeat_interleave(64, 1)
        rotated = data[:, 448:].contiguous().view(torch.bfloat16)
        return torch.cat([nope, rotated.double()], 1)


class FullDecode:
    """Inputs at real sizes. ``extra``: width of the compressed index tensor and its block size."""

    def __init__(self, tokens, heads, extra, seed=0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.sets = []
        for width, block_size in ((128, 64), *([extra] if extra else [])):
            pages = FullPages(2 + 2 * width // block_size, block_size, generator)
            slots = torch.tensor(pages.slots(), dtype=torch.int32)
            choice = torch.randint(len(slots), (tokens, width), generator=generator)
            lens = torch.randint(1, width + 1, (tokens,), generator=generator, dtype=torch.int32)
            lens[0] = width
            indices = slots[choice]
            # Beyond a length stands a slot that is NaN.
            indices[torch.arange(width) >= lens[:, None]] = 0
            self.sets.append((pages, indices, lens))
        if tokens > 2:  # a padding row
            for _, _, lens in self.sets:
                lens[2] = 0
        self.q = torch.randn(tokens, heads, 512, generator=generator).bfloat16()
        self.sink = torch.randn(max(64, heads), generator=generator)
        self.out = torch.full((tokens, heads, 512), math.nan, dtype=torch.bfloat16)
        self.lse = torch.full((tokens, heads), math.nan)

    def arguments(self) -> dict:
        (pages, indices, lens), *extra = self.sets
        names = ("extra_cache", "extra_indices", "extra_lens")
        more = [(p.cache, i, n) for p, i, n in extra]
        return dict(
            q=self.q,
            swa_cache=pages.cache,
            swa_indices=indices,
            swa_lens=lens,
            attn_sink=self.sink,
            softmax_scale=512**-0.5,
            out=self.out,
            lse=self.lse,
            **(dict(zip(names, more[0], strict=True)) if more else {}),
        )

    def keys(self) -> list[torch.Tensor]:
        return [
            torch.cat([pages.read(indices[t, : lens[t]]) for pages, indices, lens in self.sets])
            for t in range(len(self.q))
        ]
