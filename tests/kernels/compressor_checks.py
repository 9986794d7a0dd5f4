"""The compressor's definition in float64, a token at a time, and checks of a cache against it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from capture import copy_of
from pages import E4M3, LatentPages
from tolerance import assert_unbiased, error_bound

EPS = 1e-6
NOPE, GROUP = 448, 64


def nearest_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest finite e4m3 values, ties to the even code; float64 in, uint8 out."""
    positive = E4M3[:127]  # 0 to 448, ascending
    magnitude = values.abs()
    middle = (positive[1:] + positive[:-1]) / 2
    above = torch.searchsorted(middle, magnitude, right=True)
    tie = torch.isin(magnitude, middle)
    code = torch.where(tie & (above % 2 == 1), above - 1, above)
    return (code + 128 * (torch.signbit(values))).to(torch.uint8)


@dataclass
class Case:
    """Arguments of ``compress_to_cache`` over pages whose every unwritten byte is NaN.

    Attributes:
        ratio: Tokens of a group.
        overlap: Whether windows have two groups.
        positions: Position of each token; tokens of a request are neighbours.
        requests: Request of each token.
        seed: Of what is drawn.
        padded: Tokens without a slot in the state cache.
        unslotted: Tokens without a slot in the keys' cache.
    """

    ratio: int
    overlap: bool
    positions: list[int]
    requests: list[int]
    seed: int = 0
    padded: tuple[int, ...] = ()
    unslotted: tuple[int, ...] = ()
    block_size: int = 4
    page_size: int = 2
    spread: float = 1.0
    pages: LatentPages = field(init=False)
    arguments: dict[str, object] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        tokens, width = len(self.positions), 512 * (2 if self.overlap else 1)
        per_request = max(self.positions) // self.block_size + 1
        requests = max(self.requests) + 1
        blocks = requests * per_request + 3
        order = torch.randperm(blocks, generator=generator)[: requests * per_request]
        # Rows of the table are longer than what is looked at, and blocks are apart.
        table = torch.full((requests, per_request + 5), -(2**30), dtype=torch.int32)
        table[:, :per_request] = order.view(requests, per_request)
        memory = torch.full((blocks, self.block_size * 2 * width + 160), math.nan)
        states = memory.as_strided(
            (blocks, self.block_size, 2 * width), (memory.stride(0), 2 * width, 1)
        )
        for request in range(requests):
            last = max(
                (p for p, r in zip(self.positions, self.requests, strict=True) if r == request),
                default=-1,
            )
            for position in range(last + 1):
                state = torch.randn(2 * width, generator=generator)
                state[width:] *= self.spread
                block = table[request, position // self.block_size]
                states[block, position % self.block_size] = state
        slots = torch.randperm(tokens + 7, generator=generator)[:tokens]
        slots[list(self.unslotted)] = -1
        state_slots = torch.arange(tokens)
        state_slots[list(self.padded)] = -1
        angle = torch.rand(max(self.positions) + 1, 32, generator=generator) * 6.3
        self.pages = LatentPages((tokens + 7) // self.page_size + 1, self.page_size)
        self.arguments = {
            "state_cache": states,
            "token_to_request": torch.tensor(self.requests, dtype=torch.int32),
            "positions": torch.tensor(self.positions),
            "state_slots": state_slots,
            "block_table": table,
            "norm_weight": (1 + 0.3 * torch.randn(512, generator=generator)).bfloat16(),
            "eps": EPS,
            "cos_sin_cache": torch.cat([angle.cos(), angle.sin()], 1),
            "cache": self.pages.cache,
            "slots": slots,
            "compress_ratio": self.ratio,
            "overlap": self.overlap,
        }

    def counting(self) -> list[int]:
        """Tokens that leave an entry."""
        return [
            token
            for token, position in enumerate(self.positions)
            if (position + 1) % self.ratio == 0
            and token not in self.padded
            and token not in self.unslotted
        ]

    def take(self, cache: torch.Tensor) -> None:
        """Have this cache's bytes, of the same shape and strides, in place of the case's own."""
        self.pages.cache.copy_(cache)

    def entry(self, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 ``[512]``: what goes to the cache, unquantised, and the norm's results."""
        given, position = self.arguments, self.positions[token]
        table = given["block_table"][self.requests[token]]
        width = given["state_cache"].shape[2] // 2
        window = self.ratio * (2 if self.overlap else 1)
        vectors, scores = [], []
        for row in range(window):
            at = position - window + 1 + row
            if at < 0:
                continue
            state = given["state_cache"][table[at // self.block_size], at % self.block_size]
            first = 512 if self.overlap and row >= self.ratio else 0
            vectors.append(state[first : first + 512].double())
            scores.append(state[width + first : width + first + 512].double())
        vector, score = torch.stack(vectors), torch.stack(scores)
        share = (score - score.amax(0)).exp()
        compressed = (share / share.sum(0) * vector).sum(0)
        normed = compressed / (compressed.square().mean() + EPS).sqrt()
        normed = normed * given["norm_weight"].double()
        angles = given["cos_sin_cache"][position // self.ratio * self.ratio].double()
        result = normed.clone()
        for pair in range(32):
            a, b = normed[NOPE + 2 * pair], normed[NOPE + 2 * pair + 1]
            cos, sin = angles[pair], angles[32 + pair]
            result[NOPE + 2 * pair] = a * cos - b * sin
            result[NOPE + 2 * pair + 1] = b * cos + a * sin
        return result, normed


def place_of(pages: LatentPages, slot: int) -> tuple[slice, slice, slice]:
    """Bytes of a slot: e4m3 values, rotary part, and all eight of its scales."""
    values, rotated, scales = pages._places(slot)
    return values, rotated, slice(scales.start, scales.start + 8)


def check(case: Case, *, exact: float = 0.999) -> None:
    """Every entry is the definition's, and no other byte was written.

    float32 sums may move a value across a rounding to bfloat16, and so a code or a scale by one
    step; all but ``1 - exact`` of the codes must be those of the exact values.
    """
    pages = case.pages
    untouched = torch.ones_like(pages.bytes, dtype=torch.bool)
    same = total = 0
    found_rope, exact_rope = [], []
    for token in case.counting():
        slot = int(case.arguments["slots"][token])
        expected, normed = case.entry(token)
        values, rotated, scales = place_of(pages, slot)
        for part in (values, rotated, scales):
            untouched[part] = False
        found = pages.read(slot)
        # A window's sums, the mean square and the rotation, one rounding each.
        length = case.ratio * 2 + 512 + 8
        scale = normed.abs().amax()
        bound = error_bound(
            expected[NOPE:], dtype=torch.bfloat16, reduction_length=length, scale=scale
        )
        wrong = ~((found[NOPE:] - expected[NOPE:]).abs() <= bound)
        assert not wrong.any(), f"token {token}: rotary channels {wrong.nonzero().flatten()}"
        found_rope.append(found[NOPE:])
        exact_rope.append(expected[NOPE:])
        stored = pages.bytes[scales].int()
        assert stored[7] == 0
        for group in range(7):
            part = expected[group * GROUP : (group + 1) * GROUP]
            rounded = part.to(torch.float32).bfloat16().double()
            allowed = {
                math.ceil(math.log2(max(amax, 1e-4) / 448.0)) + 127
                for amax in (rounded.abs().max().item() * f for f in (1 - 2**-8, 1, 1 + 2**-8))
            }
            exponent = int(stored[group])
            assert exponent in allowed, f"token {token}, group {group}: {exponent}, not {allowed}"
            codes = pages.bytes[values][group * GROUP : (group + 1) * GROUP]
            wanted = nearest_e4m3((rounded / 2.0 ** (exponent - 127)).clamp(-448, 448))
            # Codes of one sign follow their values: neighbours differ by one.
            step = signed(codes) - signed(wanted)
            assert step.abs().max() <= 1, f"token {token}, group {group}: codes"
            same += int((step == 0).sum())
            total += GROUP
    assert torch.all(pages.bytes[untouched] == 0xFF), "bytes of no entry were written"
    if total:
        assert same >= exact * total, f"{same} of {total} codes are those of the exact values"
        if len(found_rope) > 2:
            assert_unbiased(torch.stack(found_rope), torch.stack(exact_rope))


def signed(codes: torch.Tensor) -> torch.Tensor:
    """Codes in the order of their values; both zeros are 0."""
    magnitude = (codes & 0x7F).int()
    return torch.where(codes >= 0x80, -magnitude, magnitude)


def prefill(ratio: int, overlap: bool, tokens: int, first: int = 0, **more: object) -> Case:
    """Neighbouring tokens of one request, from position ``first`` on."""
    return Case(ratio, overlap, list(range(first, first + tokens)), [0] * tokens, **more)


def on_gpu(case: Case) -> dict[str, object]:
    """The case's arguments on the GPU, of the same strides."""
    return {name: copy_of(value, "cuda") for name, value in case.arguments.items()}


def run_vllms(case: Case, given: dict[str, object] | None = None) -> torch.Tensor:
    """vLLM's Triton kernel on the case, or on a copy of its arguments; returns the cache."""
    from vllm.models.deepseek_v4.common.ops.fused_compress_quant_cache import (
        compress_norm_rope_store_triton,
    )

    given = given or case.arguments
    compress_norm_rope_store_triton(
        state_cache=given["state_cache"],
        num_actual=len(case.positions),
        token_to_req_indices=given["token_to_request"],
        positions=given["positions"],
        slot_mapping=given["state_slots"],
        block_table=given["block_table"],
        block_size=case.block_size,
        state_width=given["state_cache"].shape[2] // 2,
        cos_sin_cache=given["cos_sin_cache"],
        kv_cache=given["cache"],
        k_cache_metadata=SimpleNamespace(slot_mapping=given["slots"]),
        pdl_kwargs={},
        head_dim=512,
        rope_head_dim=64,
        compress_ratio=case.ratio,
        overlap=case.overlap,
        use_fp4_cache=False,
        rms_norm_weight=given["norm_weight"],
        rms_norm_eps=given["eps"],
        quant_block=64,
        token_stride=576,
        scale_dim=8,
    )
    return given["cache"]


def compare(ours: Case, theirs: Case) -> None:
    """Two caches of one case hold the same but for a rounding of a sum here and there."""
    a, b = (case.pages.bytes.cpu() for case in (ours, theirs))
    assert torch.equal(a == 0xFF, b == 0xFF)
    same = total = 0
    for token in ours.counting():
        values, rotated, scales = place_of(ours.pages, int(ours.arguments["slots"][token]))
        assert torch.equal(a[scales], b[scales])
        step = signed(a[values]) - signed(b[values])
        assert step.abs().max() <= 1
        same += int((step == 0).sum())
        total += len(step)
        low, high = (part[rotated].view(torch.bfloat16).float() for part in (a, b))
        torch.testing.assert_close(low, high, rtol=2**-7, atol=1e-5)
    assert same >= 0.999 * total
