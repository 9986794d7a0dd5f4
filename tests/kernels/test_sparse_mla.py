"""Sparse MLA, decode and prefill, against a definition in float64 that loops over its inputs."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from capture import record, replay_on_gpu
from pages import LatentPages
from tolerance import assert_close_to_reference, assert_unbiased
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_sm12x.ops import sparse_mla
from vllm_sm12x.ops.sparse_mla import reference

SCALE = 512**-0.5
# Beyond a length anything may stand: also a slot of page 0, which holds NaN alone.
GARBAGE = (2**31 - 1, -(2**31), 0, -1, 123_456_789)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def define(q, keys_of_token, sink, scale):
    """The definition. ``keys_of_token[t]``: float64 ``[n, 512]``.

    Returns the result, its error scale for ``assert_close_to_reference`` and the logarithm of the
    sum, all float64. A relative error ``e`` of the scores' dot products shifts a weight by
    ``2 * e * |score terms|``; that multiplies the scale of the final sum.
    """
    tokens, heads, dim = q.shape
    out = torch.zeros(tokens, heads, dim, dtype=torch.float64)
    error_scale = torch.zeros_like(out)
    lse = torch.full((tokens, heads), -math.inf, dtype=torch.float64)
    for t in range(tokens):
        keys = keys_of_token[t]
        if len(keys) == 0:
            continue
        for h in range(heads):
            query = q[t, h].double()
            scores = [scale * torch.dot(query, key).item() for key in keys]
            largest = max([*scores, sink[h].item()])
            exponentials = [math.exp(score - largest) for score in scores]
            total = sum(exponentials) + math.exp(sink[h].item() - largest)
            terms = max(scale * torch.dot(query.abs(), key.abs()).item() for key in keys)
            for weight, key in zip(exponentials, keys, strict=True):
                out[t, h] += weight / total * key
                error_scale[t, h] += weight / total * key.abs() * (1 + 2 * terms)
            top = max(scores)
            lse[t, h] = top + math.log(sum(math.exp(score - top) for score in scores))
    return out, error_scale, lse


def named_slots(indices, lens, t, capacity):
    count = max(0, min(int(lens[t]), indices.shape[1]))
    return [slot for slot in indices[t, :count].tolist() if 0 <= slot < capacity]


def check(actual, lse, q, keys_of_token, sink, scale):
    expected, error_scale, expected_lse = define(q, keys_of_token, sink, scale)
    longest = max(len(keys) for keys in keys_of_token)
    length = 512 + longest + 16
    assert_close_to_reference(
        actual, expected, dtype=torch.bfloat16, reduction_length=length, scale=error_scale
    )
    terms = 1 + (error_scale.amax() / 1e-30).clamp(max=1).item() * expected_lse.abs().masked_fill(
        expected_lse.isinf(), 0
    )
    magnitude = (
        q.double().norm(dim=2)
        * scale
        * max([keys.norm(dim=1).max().item() for keys in keys_of_token if len(keys)], default=0.0)
    )
    assert_close_to_reference(
        lse,
        expected_lse,
        dtype=torch.float32,
        reduction_length=length,
        scale=terms + magnitude,
    )
    for t, keys in enumerate(keys_of_token):
        if len(keys) == 0:
            assert torch.equal(actual[t], torch.zeros_like(actual[t])), "no key: exactly zero"


class Decode:
    """Inputs of one decode call; every buffer and every unused byte is NaN or garbage."""

    def __init__(
        self,
        lens,
        width,
        *,
        heads=8,
        block_size=64,
        blocks=4,
        stride=None,
        extra_lens=None,
        extra_width=0,
        extra_block_size=2,
        seed=0,
        magnitude=1.0,
    ):
        generator = rng(seed)
        tokens = len(lens)
        self.sets = []
        for set_lens, set_width, size, count, set_stride in (
            (lens, width, block_size, blocks, stride),
            (extra_lens, extra_width, extra_block_size, 300, None),
        ):
            if set_lens is None:
                continue
            pages = LatentPages(count, size, set_stride)
            # Page 0 stays unwritten: what stands in for an absent key must not be read as numbers.
            used = (torch.randperm((count - 1) * size, generator=generator) + size)[:40].tolist()
            for slot in used:
                pages.write_random(slot, generator, magnitude)
            indices = torch.tensor(GARBAGE, dtype=torch.int32).repeat(tokens, set_width)
            indices = indices[:, :set_width].contiguous()
            for t, length in enumerate(set_lens):
                length = max(0, min(length, set_width))
                choice = torch.randint(len(used), (length,), generator=generator).tolist()
                indices[t, :length] = torch.tensor([used[i] for i in choice], dtype=torch.int32)
            self.sets.append((pages, indices, torch.tensor(set_lens, dtype=torch.int32)))
        self.q = (torch.randn(tokens, heads, 512, generator=generator) * magnitude).bfloat16()
        self.sink = torch.randn(heads + 3, generator=generator)
        self.out = torch.full((tokens, heads, 512), math.nan, dtype=torch.bfloat16)
        self.lse = torch.full((tokens, heads), math.nan)

    def run(self, scale=SCALE):
        (pages, indices, lens), *extra = self.sets
        more = [(pages_.cache, indices_, lens_) for pages_, indices_, lens_ in extra]
        sparse_mla.sparse_mla_decode(
            self.q,
            pages.cache,
            indices,
            lens,
            self.sink,
            scale,
            self.out,
            *(more[0] if more else ()),
            lse=self.lse,
        )

    def keys(self):
        tokens = []
        for t in range(len(self.q)):
            keys = [
                pages.read(slot)
                for pages, indices, lens in self.sets
                for slot in named_slots(indices, lens, t, pages.cache.shape[0] * pages.block_size)
            ]
            tokens.append(torch.stack(keys) if keys else torch.empty(0, 512, dtype=torch.float64))
        return tokens

    def check(self, scale=SCALE):
        self.run(scale)
        check(self.out, self.lse, self.q, self.keys(), self.sink, scale)


@pytest.mark.parametrize(
    "shape",
    [
        dict(lens=[1], width=1, heads=1),
        dict(lens=[0, 1, 128, 77, 3], width=128),
        dict(lens=[128, 5], width=128, heads=64),
        dict(lens=[9, 13], width=13, block_size=2, blocks=50),
        dict(lens=[64, 10], width=130, stride=584 * 64 + 8),
        dict(lens=[20, 0, 7, 0], width=128, extra_lens=[0, 30, 99, 0], extra_width=100),
        dict(lens=[128], width=128, extra_lens=[512], extra_width=512, extra_block_size=64),
        dict(lens=[3, 128], width=128, extra_lens=[1, 17], extra_width=1024, heads=3),
        dict(lens=[-5, 200], width=128, extra_lens=[-1, 9], extra_width=7),
    ],
)
def test_decode_equals_the_definition(shape):
    Decode(**shape).check()


@pytest.mark.parametrize("budget", [1, 4 << 20])
def test_chunks_do_not_show(monkeypatch, budget):
    monkeypatch.setattr(reference, "SCRATCH_BYTES", budget)
    Decode([5, 0, 60, 3, 1], 64, extra_lens=[0, 0, 9, 40, 2], extra_width=40).check()


@pytest.mark.parametrize("magnitude", [0.05, 1.0, 4.0])
def test_realistic_and_peaked_scores(magnitude):
    case = Decode([100, 128], 128, extra_lens=[200, 150], extra_width=256, magnitude=magnitude)
    # Each head looks for a key: queries near keys give scores far apart.
    keys = case.keys()
    for t in range(2):
        for h in range(8):
            direction = keys[t][h * 11] / keys[t][h * 11].norm()
            case.q[t, h] = (magnitude * 22.0 * direction + case.q[t, h].double()).bfloat16()
    case.check()


def test_absent_keys_among_present_ones():
    case = Decode([100, 50], 128)
    indices = case.sets[0][1]
    indices[0, 0:100:3] = -1
    indices[0, 1] = 4 * 64  # the first slot beyond the cache
    indices[0, 2] = 2**31 - 1
    indices[1, :50] = -1
    case.check()
    assert len(case.keys()[0]) == 64 and len(case.keys()[1]) == 0


def test_no_token_names_a_key():
    case = Decode([128, 0, 128], 128, extra_lens=[10, 0, 0], extra_width=16)
    for _, indices, _ in case.sets:
        indices.fill_(-1)
    case.q[1] = math.nan  # a padding row may hold anything
    case.run()
    assert torch.equal(case.out, torch.zeros_like(case.out))
    assert case.lse.eq(-math.inf).all()


def test_a_key_named_twice_counts_twice():
    # One-hot keys show each weight as one number of the result.
    pages = LatentPages(1, 64)
    for slot in range(4):
        nope = torch.zeros(448, dtype=torch.uint8)
        nope[slot] = 0x38
        pages.write(
            slot, nope, torch.full((7,), 127, dtype=torch.uint8), torch.zeros(64).bfloat16()
        )
    out = torch.full((1, 1, 512), math.nan, dtype=torch.bfloat16)
    sparse_mla.sparse_mla_decode(
        torch.zeros(1, 1, 512).bfloat16(),
        pages.cache,
        torch.tensor([[2, 0, 2, 3, 2, 1]], dtype=torch.int32),
        torch.tensor([5], dtype=torch.int32),
        torch.tensor([math.log(3.0)]),
        SCALE,
        out,
    )
    # Weights 1 for each entry of the five, 3 for the sink.
    expected = torch.zeros(512)
    expected[[0, 2, 3]] = torch.tensor([1 / 8, 3 / 8, 1 / 8])
    assert torch.allclose(out[0, 0].float(), expected, atol=1e-6)


@pytest.mark.parametrize("value", [-math.inf, -1e30, -50.0, 0.0, 20.0, 100.0, 1e30])
def test_sinks(value):
    case = Decode([5, 0, 1], 16, extra_lens=[3, 0, 0], extra_width=5)
    case.sink[::2] = value
    case.check()


def test_softmax_scale_is_applied():
    Decode([30, 2], 32).check(scale=0.25)


def test_nan_in_a_key_that_is_named_shows():
    case = Decode([3], 8)
    case.sets[0][1][0, 1] = 0  # page 0 is NaN all over
    case.run()
    assert case.out.isnan().all()


def test_slots_beyond_two_to_the_31_bytes():
    pages = LatentPages(57_400, 64, untouched=True)
    slots = [57_400 * 64 - 1, 57_390 * 64 + 5]
    for seed, slot in enumerate(slots):
        pages.write_random(slot, rng(seed))
    case = Decode([2], 4)
    indices = torch.tensor([[*slots, 2**31 - 1, -7]], dtype=torch.int32)
    case.sets = [(pages, indices, torch.tensor([2], dtype=torch.int32))]
    case.check()


def test_an_empty_cache_and_empty_batches():
    case = Decode([3, 0], 8, extra_lens=[0, 0], extra_width=0)
    case.check()
    none = Decode([], 8)
    none.run()
    assert none.out.shape == (0, 8, 512)
    case = Decode([0, 3], 8)
    empty = torch.empty(0, 64, 584, dtype=torch.uint8)
    out = torch.full_like(case.out, math.nan)
    sparse_mla.sparse_mla_decode(
        case.q, empty, case.sets[0][1], case.sets[0][2], case.sink, SCALE, out
    )
    assert torch.equal(out, torch.zeros_like(out))


def test_strided_arguments():
    case = Decode([5, 9], 16, heads=4)
    expected = Decode([5, 9], 16, heads=4)
    expected.run()
    wide = torch.full((2, 9, 512), math.nan, dtype=torch.bfloat16)
    wide[:, 2:6] = case.q
    case.q = wide[:, 2:6]
    out = torch.full((2, 7, 512), math.nan, dtype=torch.bfloat16)
    case.out = out[:, 1:5]
    pages, indices, lens = case.sets[0]
    buffer = torch.full((2, 40), 99_999, dtype=torch.int32)
    buffer[:, :16] = indices
    case.sets = [(pages, buffer[:, :16], lens)]
    case.run()
    assert torch.equal(case.out, expected.out)
    assert out[:, 0].isnan().all() and out[:, 5:].isnan().all(), "nothing beside `out` is written"


def test_results_are_not_biased():
    case = Decode([128, 90], 128, extra_lens=[300, 17], extra_width=300)
    case.run()
    expected, _, _ = define(case.q, case.keys(), case.sink, SCALE)
    assert_unbiased(case.out, expected)


class Prefill:
    def __init__(self, lens, width, *, rows=60, heads=8, seed=0):
        generator = rng(seed)
        tokens = len(lens)
        self.kv = torch.full((rows, 512), math.nan, dtype=torch.bfloat16)
        # Row 0 stays NaN.
        used = (torch.randperm(rows - 1, generator=generator)[:40] + 1).tolist()
        for row in used:
            self.kv[row] = torch.randn(512, generator=generator).bfloat16()
        self.indices = torch.tensor(GARBAGE, dtype=torch.int32).repeat(tokens, width)
        self.indices = self.indices[:, :width].contiguous()
        for t, length in enumerate(lens):
            length = max(0, min(length, width))
            choice = torch.randint(len(used), (length,), generator=generator).tolist()
            self.indices[t, :length] = torch.tensor([used[i] for i in choice], dtype=torch.int32)
        self.lens = torch.tensor(lens, dtype=torch.int32)
        self.q = torch.randn(tokens, heads, 512, generator=generator).bfloat16()
        self.sink = torch.randn(heads, generator=generator)
        self.out = torch.full((tokens, heads, 512), math.nan, dtype=torch.bfloat16)
        self.lse = torch.full((tokens, heads), math.nan)

    def run(self):
        sparse_mla.sparse_mla_prefill(
            self.q, self.kv, self.indices, self.lens, self.sink, SCALE, self.out, lse=self.lse
        )

    def keys(self):
        return [
            self.kv[named_slots(self.indices, self.lens, t, len(self.kv))].double()
            for t in range(len(self.q))
        ]

    def check(self):
        self.run()
        check(self.out, self.lse, self.q, self.keys(), self.sink, SCALE)


@pytest.mark.parametrize(
    "shape",
    [
        dict(lens=[1], width=1, heads=1),
        dict(lens=[0, 1, 128, 77, 3], width=128),
        dict(lens=[640, 5], width=640, heads=64),
        dict(lens=[-1, 9, 0, 13], width=11, heads=3),
    ],
)
def test_prefill_equals_the_definition(shape):
    Prefill(**shape).check()


@pytest.mark.parametrize("budget", [1, 4 << 20])
def test_prefill_chunks_do_not_show(monkeypatch, budget):
    monkeypatch.setattr(reference, "SCRATCH_BYTES", budget)
    Prefill([5, 0, 60, 3, 1], 64).check()


def test_prefill_absent_keys_and_no_keys():
    case = Prefill([30, 30, 30], 32)
    case.indices[0, ::2] = -1
    case.indices[0, 1] = 60
    case.indices[1] = -1
    case.sink[0] = -math.inf
    case.sink[1] = 1e30
    case.check()


def test_prefill_without_keys_at_all():
    case = Prefill([3, 0], 8)
    case.kv = case.kv[:0]
    case.run()
    assert torch.equal(case.out, torch.zeros_like(case.out))
    Prefill([], 8).run()


def test_prefill_and_decode_agree():
    case = Decode([40, 3, 0], 64)
    case.run()
    pages, indices, lens = case.sets[0]
    kv = torch.stack([pages.read(slot) for slot in range(4 * 64)]).bfloat16()
    out = torch.full_like(case.out, math.nan)
    sparse_mla.sparse_mla_prefill(case.q, kv, indices, lens, case.sink, SCALE, out)
    # Powers of two scale e4m3 exactly, so bfloat16 holds every key.
    assert torch.equal(out, case.out)


def decode_case(seed: int, tokens: int = 6) -> Decode:
    lens = torch.randint(0, 64, (tokens,), generator=rng(seed)).tolist()
    return Decode(lens, 64, extra_lens=lens[::-1], extra_width=100, seed=seed)


def prefill_case(seed: int, tokens: int = 6) -> Prefill:
    lens = torch.randint(0, 64, (tokens,), generator=rng(seed)).tolist()
    return Prefill(lens, 64, seed=seed)


def decode_arguments(case: Decode) -> dict:
    (pages, indices, lens_), (extra, extra_indices, extra_lens) = case.sets
    return dict(
        q=case.q,
        swa_cache=pages.cache,
        swa_indices=indices,
        swa_lens=lens_,
        attn_sink=case.sink,
        softmax_scale=SCALE,
        out=case.out,
        extra_cache=extra.cache,
        extra_indices=extra_indices,
        extra_lens=extra_lens,
        lse=case.lse,
    )


def prefill_arguments(case: Prefill) -> dict:
    return dict(
        q=case.q,
        kv=case.kv,
        indices=case.indices,
        lens=case.lens,
        attn_sink=case.sink,
        softmax_scale=SCALE,
        out=case.out,
        lse=case.lse,
    )


@pytest.mark.parametrize("budget", [1, 4 << 20, 256 << 20])
@pytest.mark.parametrize(
    ("operation", "case", "arguments", "scratch", "keys"),
    [
        (
            sparse_mla.sparse_mla_decode,
            decode_case,
            decode_arguments,
            sparse_mla.decode_scratch_bytes,
            164,
        ),
        (
            sparse_mla.sparse_mla_prefill,
            prefill_case,
            prefill_arguments,
            sparse_mla.prefill_scratch_bytes,
            64,
        ),
    ],
)
def test_capture_safe_and_within_the_stated_scratch(
    monkeypatch, operation, case, arguments, scratch, keys, budget
):
    monkeypatch.setattr(reference, "SCRATCH_BYTES", budget)
    operation = functools.partial(operation, implementation="reference")
    first = record(operation, **arguments(case(1)))
    second = record(operation, **arguments(case(2)))
    assert first.calls == second.calls, "the launches depend on what the tensors hold"
    stated = scratch(6, 8, keys, implementation="reference")
    assert first.peak_bytes <= stated
    assert first.peak_bytes > stated / 2, "the stated scratch is far too much"


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [4 << 20, 256 << 20])
@pytest.mark.parametrize(
    ("operation", "make", "arguments"),
    [
        (sparse_mla.sparse_mla_decode, decode_case, decode_arguments),
        (sparse_mla.sparse_mla_prefill, prefill_case, prefill_arguments),
    ],
)
def test_a_captured_graph_follows_its_inputs(monkeypatch, operation, make, arguments, budget):
    monkeypatch.setattr(reference, "SCRATCH_BYTES", budget)
    operation = functools.partial(operation, implementation="reference")
    case = make(2, tokens=40)
    _, after = replay_on_gpu(operation, arguments(make(1, tokens=40)), arguments(case))
    check(after["out"], after["lse"], case.q, case.keys(), case.sink, SCALE)


@pytest.mark.parametrize("heads", [8, 64])
@pytest.mark.parametrize("keys", [128, 640, 128 + 8192])
@pytest.mark.parametrize("tokens", [1, 512, 4096])
def test_scratch_stays_in_the_budget_at_real_shapes(tokens, keys, heads):
    for scratch in (sparse_mla.decode_scratch_bytes, sparse_mla.prefill_scratch_bytes):
        stated = scratch(tokens, heads, keys, implementation="reference")
        assert 0 < stated <= reference.SCRATCH_BYTES


def test_runs_on_a_fake_gpu():
    """Devices, strides and shapes fit without values, at a real size."""
    with FakeTensorMode():
        gpu = torch.device("cuda")
        raw = torch.empty(64 * 37440, dtype=torch.uint8, device=gpu)
        small = torch.empty(64 * 1728, dtype=torch.uint8, device=gpu)
        ints = dict(dtype=torch.int32, device=gpu)
        q = torch.empty(512, 64, 512, dtype=torch.bfloat16, device=gpu)
        out = torch.empty_like(q)
        sink = torch.empty(64, device=gpu)
        sparse_mla.sparse_mla_decode(
            q,
            raw.as_strided((64, 64, 584), (37440, 584, 1)),
            torch.empty(512, 128, **ints),
            torch.empty(512, **ints),
            sink,
            SCALE,
            out,
            small.as_strided((64, 2, 584), (1728, 584, 1)),
            torch.empty(512, 1024, **ints),
            torch.empty(512, **ints),
            implementation="reference",
        )
        kv = torch.empty(4096, 512, dtype=torch.bfloat16, device=gpu)
        indices = torch.empty(512, 640, **ints)
        lens = torch.empty(512, **ints)
        sparse_mla.sparse_mla_prefill(
            q, kv, indices, lens, sink, SCALE, out, implementation="reference"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(6, 8, 512)), "q: dtype torch.float32, allowed: torch.bfloat16"),
        (dict(q=torch.zeros(6, 8, 576).bfloat16()), "q: shape .*512"),
        (dict(q=torch.zeros(6, 512, 8).bfloat16().mT), r"q: stride\(2\) is 8, allowed: 1"),
        (dict(out=torch.zeros(6, 4, 512).bfloat16()), "out: shape .*H=8"),
        (dict(out=None), "out: expected a tensor, got NoneType"),
        (dict(swa_cache=torch.zeros(4, 64, 1, 584, dtype=torch.uint8)), "swa_cache: shape"),
        (dict(swa_indices=torch.zeros(6, 64, dtype=torch.int64)), "swa_indices: dtype"),
        (dict(swa_indices=torch.zeros(5, 64, dtype=torch.int32)), "swa_indices: shape .*T=6"),
        (dict(swa_indices=torch.zeros(64, 6, dtype=torch.int32).t()), r"swa_indices: stride\(1\)"),
        (dict(swa_lens=torch.zeros(6, 1, dtype=torch.int32)), "swa_lens: shape"),
        (dict(swa_lens=torch.zeros(6, dtype=torch.int32, device="meta")), "swa_lens: device meta"),
        (dict(attn_sink=torch.zeros(7)), r"attn_sink: shape \(7,\), allowed: \(8 or more,\)"),
        (dict(attn_sink=torch.zeros(8).bfloat16()), "attn_sink: dtype"),
        (dict(extra_lens=None), "extra_lens: got None, allowed: all of extra_cache"),
        (dict(extra_cache=torch.zeros(4, 2, 576, dtype=torch.uint8)), "extra_cache: shape"),
        (dict(extra_indices=torch.zeros(6, 64)), "extra_indices: dtype"),
        (dict(lse=torch.zeros(6, 9)), "lse: shape"),
        (dict(batch_tokens=5), "batch_tokens: 5, allowed: 6"),
    ],
)
def test_bad_decode_arguments_are_named(change, message):
    arguments = decode_arguments(decode_case(0))
    with pytest.raises(ValueError, match=message):
        sparse_mla.sparse_mla_decode(**{**arguments, **change})
    assert arguments["out"].isnan().all(), "nothing is written before the checks"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kv=torch.zeros(60, 1, 512).bfloat16()), "kv: shape"),
        (dict(kv=torch.zeros(60, 512)), "kv: dtype"),
        (dict(indices=torch.zeros(6, 1, 64, dtype=torch.int32)), "indices: shape"),
        (dict(lens=torch.zeros(6)), "lens: dtype"),
        (dict(kv=torch.zeros(60, 512, device="meta").bfloat16()), "kv: device meta, allowed: cpu"),
    ],
)
def test_bad_prefill_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        sparse_mla.sparse_mla_prefill(**{**prefill_arguments(prefill_case(0)), **change})
