"""After an operation's warm-up, no call of it compiles: the keys of calls are among those made.

The calls are of many sizes, with tensors that are slices as the engine makes them: their rows begin
anywhere, so that what has one number a row begins at any multiple of its size.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from launch_keys import Keys, recorded

from vllm_sm12x.ops import launching
from vllm_sm12x.ops.compressor import compress_to_cache
from vllm_sm12x.ops.compressor import warm_up as compressor_warm_up
from vllm_sm12x.ops.fp8_einsum import fp8_einsum_bhr_hdr
from vllm_sm12x.ops.fp8_einsum import warm_up as einsum_warm_up
from vllm_sm12x.ops.mhc import hc_head, mhc_fused_post_pre, mhc_post, mhc_pre
from vllm_sm12x.ops.mhc import warm_up as mhc_warm_up
from vllm_sm12x.ops.mqa_logits import fp8_mqa_logits
from vllm_sm12x.ops.mqa_logits import warm_up as mqa_warm_up
from vllm_sm12x.ops.mxfp4_experts import mxfp4_experts
from vllm_sm12x.ops.mxfp4_experts import warm_up as experts_warm_up
from vllm_sm12x.ops.paged_mqa_logits import fp8_paged_mqa_logits
from vllm_sm12x.ops.paged_mqa_logits import warm_up as paged_warm_up
from vllm_sm12x.ops.sparse_mla import sparse_mla_decode, sparse_mla_prefill
from vllm_sm12x.ops.sparse_mla import warm_up as sparse_mla_warm_up
from vllm_sm12x.proof import discover

CAPABILITIES = ((12, 0), (12, 1), (9, 0))
MOST_TOKENS = 8192
E4M3, BF16, I32 = torch.float8_e4m3fn, torch.bfloat16, torch.int32

draw = random.Random(20261123)


def token_counts() -> list[int]:
    """All small ones, both sides of powers of two and of multiples of them, the most, and some."""
    near = {base + step for base in (256, 512, 1024, 2048, 4096, 5461) for step in (-1, 0, 1, 16)}
    chosen = {*range(1, 140), *near, MOST_TOKENS - 1, MOST_TOKENS}
    return sorted(chosen | {draw.randrange(1, MOST_TOKENS) for _ in range(40)})


# Where tensors are made: on the GPU they hold zeros, which every operation takes.
device = "meta"


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def rows(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``[count, *shape]`` from the middle of a longer tensor."""
    first = draw.randrange(17)
    return tensor(first + count + 1, *shape, dtype=dtype)[first : first + count]


def pages(number: int, block: int, width: int, stride: int) -> torch.Tensor:
    memory = tensor(number * stride, dtype=torch.uint8)
    return memory.as_strided((number, block, width), (stride, width, 1))


# Each gives a warm-up and calls, both without arguments.

Case = tuple[Callable[[], None], Iterator[Callable[[], object]]]


def einsum(capability: tuple[int, int], groups: int = 4) -> Case:
    weight, scale = tensor(groups * 1024, 4096, dtype=E4M3), tensor(groups * 8, 32)

    def calls():
        for tokens in token_counts():
            aligned = -(-tokens // 4) * 4
            a = tensor(groups, tokens, 4096, dtype=E4M3).transpose(0, 1)
            a_scale = tensor(groups * 32 * aligned).as_strided(
                (tokens, groups, 32), (1, 32 * aligned, aligned)
            )
            for given in (a, a[tokens // 2 :]):
                count = len(given)
                out = rows(count, groups, 1024, dtype=BF16)
                yield lambda x=given, s=a_scale[-count:], out=out: fp8_einsum_bhr_hdr(
                    x, s, weight, scale, out, implementation="triton"
                )

    return (
        lambda: einsum_warm_up.warm_up(MOST_TOKENS, groups, weight, scale, capability),
        calls(),
    )


def einsum_of_one_group(capability: tuple[int, int]) -> Case:
    return einsum(capability, 1)


def prefill_logits(capability: tuple[int, int]) -> Case:
    def calls():
        for tokens in token_counts():
            keys = draw.randrange(1, 40_000)
            yield lambda tokens=tokens, keys=keys: fp8_mqa_logits(
                rows(tokens, 64, 128, dtype=E4M3),
                tensor(keys, 128, dtype=E4M3),
                rows(keys),
                rows(tokens, 64),
                rows(tokens, dtype=I32),
                rows(tokens, dtype=I32),
                implementation="triton",
            )

    return lambda: mqa_warm_up.warm_up(64), calls()


def decode_logits(capability: tuple[int, int]) -> Case:
    cache = pages(300, 64, 132, 8640).unsqueeze(-2)
    most = 512

    def calls():
        for count in range(1, most + 1):
            for next_n in (1, 2, 3, 4):
                if count % next_n == 0:
                    requests, width = count // next_n, draw.randrange(1, 2050)
                    table = rows(requests, width + draw.randrange(3), dtype=I32)[:, :width]
                    yield (
                        lambda count=count, requests=requests, next_n=next_n, table=table: (
                            fp8_paged_mqa_logits(
                                rows(requests, next_n, 64, 128, dtype=E4M3),
                                cache,
                                rows(count, 64),
                                rows(requests, next_n, dtype=I32),
                                table,
                                32768,
                                implementation="triton",
                            )
                        )
                    )

    return lambda: paged_warm_up.warm_up(most, 64, cache, 32768, capability), calls()


def hyper_connections(capability: tuple[int, int]) -> Case:
    hidden, mult, mixes = 4096, 4, 24
    mapping = (tensor(mixes, mult * hidden), tensor(3), tensor(mixes))
    head = (tensor(mult, mult * hidden), tensor(1), tensor(mult))
    norm = tensor(hidden, dtype=BF16)
    numbers = (1e-6, 1e-6, 1e-6, 2.0, 20)

    def calls():
        for tokens in token_counts():
            residual, x = rows(tokens, mult, hidden, dtype=BF16), rows(tokens, hidden, dtype=BF16)
            post, comb = tensor(tokens, mult, 1), tensor(tokens, mult, mult)
            mixed = (*mapping, *numbers)
            options = {"norm_weight": norm, "implementation": "triton"}
            yield lambda r=residual, m=mixed, o=options: mhc_pre(r, *m, **o)
            given = (x, residual, post, comb)
            yield lambda g=given, m=mixed, o=options: mhc_fused_post_pre(*g, *m, **o)
            yield lambda g=given: mhc_post(*g, implementation="triton")
            yield lambda r=residual: hc_head(r, *head, 1e-6, 1e-6, implementation="triton")

    def warm_up():
        mhc_warm_up.warm_up_layer(MOST_TOKENS, *mapping, norm, capability)
        mhc_warm_up.warm_up_head(MOST_TOKENS, *head, capability)

    return warm_up, calls()


def experts(
    capability: tuple[int, int],
    number: int = 256,
    intermediate: int = 1024,
    ids: torch.dtype = I32,
    mapped: bool = False,
    activations: str = "bfloat16",
) -> Case:
    hidden, top_k = 4096, 6
    weights = (
        tensor(number, 2 * intermediate, hidden // 2, dtype=torch.uint8),
        tensor(number, 2 * intermediate, hidden // 32, dtype=torch.uint8),
        tensor(number, hidden, intermediate // 2, dtype=torch.uint8),
        tensor(number, hidden, intermediate // 32, dtype=torch.uint8),
    )
    expert_map = tensor(2 * number, dtype=I32) if mapped else None

    def calls():
        # Also more than are worked on at a time: 5,461.
        for tokens in token_counts():
            yield lambda tokens=tokens: mxfp4_experts(
                rows(tokens, hidden, dtype=BF16),
                *weights,
                rows(tokens, top_k),
                rows(tokens, top_k, dtype=ids),
                rows(tokens, hidden, dtype=BF16),
                swiglu_limit=10.0,
                expert_map=expert_map,
                activations=activations,
                implementation="triton",
            )

    return (
        lambda: experts_warm_up.warm_up(
            MOST_TOKENS, top_k, ids, weights, 10.0, False, expert_map, activations, capability
        ),
        calls(),
    )


def half_of_the_experts(capability: tuple[int, int]) -> Case:
    return experts(capability, 128, 2048, torch.int64, mapped=True)


def experts_of_float8(capability: tuple[int, int]) -> Case:
    return experts(capability, activations="float8")


def decode(
    capability: tuple[int, int], heads: int = 32, extra: tuple[int, int, int] | None = None
) -> Case:
    window, most = 128, 512
    swa = pages(900, 64, 584, 37440)
    sink = tensor(64)
    block, stride, width = extra or (0, 0, 0)
    extra_cache = pages(700, block, 584, stride) if extra else None

    def calls():
        for tokens in range(1, most + 1):
            given = {}
            if extra:
                given = {
                    "extra_cache": extra_cache,
                    "extra_indices": rows(tokens, width, dtype=I32),
                    "extra_lens": rows(tokens, dtype=I32),
                }
            yield lambda tokens=tokens, given=given: sparse_mla_decode(
                rows(tokens, heads, 512, dtype=BF16),
                swa,
                rows(tokens, window, dtype=I32),
                rows(tokens, dtype=I32),
                sink,
                512**-0.5,
                rows(tokens, heads, 512, dtype=BF16),
                **given,
                implementation="triton",
            )

    return (
        lambda: sparse_mla_warm_up.warm_up_decode(
            most, heads, sink, swa, window, extra_cache, width
        ),
        calls(),
    )


def decode_c4a(capability: tuple[int, int]) -> Case:
    return decode(capability, 32, (64, 37440, 512))


def decode_c128a(capability: tuple[int, int]) -> Case:
    return decode(capability, 16, (2, 1728, 1024))


def prefill(capability: tuple[int, int], heads: int = 32) -> Case:
    sink = tensor(64)

    def calls():
        for tokens in token_counts():
            keys, width = draw.randrange(1, 500_000), draw.choice([128, 640, 1152])
            yield lambda tokens=tokens, keys=keys, width=width: sparse_mla_prefill(
                rows(tokens, heads, 512, dtype=BF16),
                rows(keys, 512, dtype=BF16),
                rows(tokens, width, dtype=I32),
                rows(tokens, dtype=I32),
                sink,
                512**-0.5,
                rows(tokens, heads, 512, dtype=BF16),
                implementation="triton",
            )

    return lambda: sparse_mla_warm_up.warm_up_prefill(heads, sink, 640), calls()


def prefill_of_few_heads(capability: tuple[int, int]) -> Case:
    return prefill(capability, 8)


def compressor(capability: tuple[int, int]) -> Case:
    states = tensor(40, 8, 1024)
    given = (tensor(512, dtype=BF16), 1e-6, tensor(131_072, 64), pages(700, 2, 584, 1728))

    def calls():
        for tokens in token_counts():
            table = tensor(draw.randrange(1, 65), draw.randrange(1, 2050), dtype=I32)
            a_token = [rows(tokens, dtype=torch.int64) for _ in range(3)]
            yield lambda t=a_token, n=tokens, table=table: compress_to_cache(
                states,
                rows(n, dtype=I32),
                *t[:2],
                table,
                *given,
                t[2],
                128,
                False,
                implementation="triton",
            )

    norm, _, turns, cache = given
    return lambda: compressor_warm_up.warm_up(states, norm, turns, cache, 128, False), calls()


EXPERTS = {"halve_kernel", "product_kernel", "weighted_sum_kernel", "local_experts_kernel"}

# The kernels that each must meet, so that a case that launches nothing fails.
CASES = {
    einsum: {"einsum_kernel"},
    einsum_of_one_group: {"einsum_kernel"},
    prefill_logits: {"logits_kernel"},
    decode_logits: {"paged_logits_kernel"},
    hyper_connections: {"halve_kernel", "mix_kernel", "finish_kernel", "post_kernel"},
    experts: EXPERTS,
    half_of_the_experts: EXPERTS,
    # Few pairs take bfloat16, and more take e4m3, which has no halves.
    experts_of_float8: EXPERTS - {"halve_kernel"} | {"quantize_kernel"},
    decode: {"split_kernel", "_combine_kernel"},
    decode_c4a: {"split_kernel", "_combine_kernel"},
    decode_c128a: {"split_kernel", "_combine_kernel"},
    compressor: {"compress_kernel"},
    prefill: {"prefill_kernel"},
    prefill_of_few_heads: {"prefill_kernel"},
}


def keys_of_both(case: Callable[..., Case], capability: tuple[int, int]) -> tuple[Keys, Keys]:
    """What the warm-up makes, and what the calls ask for."""
    with recorded(capability) as made:
        warm_up, calls = case(capability)
        warm_up()
    with recorded(capability) as asked:
        for call in calls:
            call()
    return made, asked


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"{c[0]}.{c[1]}")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_calls_compile_nothing_more(case, capability):
    made, asked = keys_of_both(case, capability)
    names = {
        name.replace("split_kernel", "split_kernel").replace("__", "_") for name in asked.kernels
    }
    assert names == CASES[case]
    assert asked.missing_from(made) == []
    # Nor does the warm-up compile what no call asks for.
    assert made.missing_from(asked) == []


def without(number: int):
    """``one_of_each`` that forgets one class."""

    def forgetful(numbers, kind):
        found = launching.one_of_each(numbers, kind)
        del found[number]
        return found

    return forgetful


@pytest.mark.parametrize(
    ("case", "module", "number", "told"),
    [
        (einsum, einsum_warm_up, 1, "einsum_kernel: constexpr .*'BLOCK_T': 16"),
        (hyper_connections, mhc_warm_up, 0, "mix_kernel: constexpr .*'BLOCK_T': 16"),
        (hyper_connections, mhc_warm_up, 3, "finish_kernel: constexpr .*'MIX_T': 32"),
        (experts, experts_warm_up, 0, "product_kernel: constexpr .*'MOST_PAIRS': 256"),
        (experts, experts_warm_up, 2, "product_kernel: constexpr .*'BLOCK_M': 32"),
        (decode_c4a, sparse_mla_warm_up, -1, "split_kernel: constexpr .*'ONE_SPLIT': True"),
        (decode_logits, paged_warm_up, 0, "paged_logits_kernel"),
    ],
)
def test_a_class_that_is_left_out_is_named(monkeypatch, case, module, number, told):
    monkeypatch.setattr(module, "one_of_each", without(number))
    made, asked = keys_of_both(case, (12, 0))
    missing = asked.missing_from(made)
    assert any(re.search(told, text) for text in missing), missing


def test_an_unaligned_pointer_that_is_specialised_is_named():
    """The test sees alignment: a tensor that warm-up takes to be aligned, and a call does not."""
    with recorded((12, 0)) as made:
        mqa_warm_up.warm_up(64)
    with recorded((12, 0)) as asked:
        weights = tensor(2 * 64 + 1)[1:].view(2, 64)
        int32 = tensor(2, dtype=I32)
        q, k = tensor(2, 64, 128, dtype=E4M3), tensor(2, 128, dtype=E4M3)
        fp8_mqa_logits(q, k, tensor(2), weights, int32, int32, implementation="triton")
    (text,) = asked.missing_from(made)
    assert text.startswith("logits_kernel: ")
    assert "divisible by 16 ['q', 'k', 'out', 'q_token'," in text


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_no_call_compiles_on_a_gpu(case, monkeypatch):
    """As vLLM's monitor counts it, after a warm-up in a process that has compiled nothing yet."""
    from triton import knobs

    for given in discover.cases().values():
        for compiled_case in given:
            compiled_case.kernel.device_caches.clear()
    monkeypatch.setattr(sys.modules[__name__], "device", "cuda")
    capability = torch.cuda.get_device_capability()
    warm_up, calls = case(capability)
    with launching.compile_only(capability) as compilation:
        warm_up()
    for kernel in compilation.kernels:
        kernel.run  # noqa: B018 (reading the property loads it)
    compiled = []
    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(event["repr"])
        for call in calls:
            call()
        torch.cuda.synchronize()
    assert compilation.kernels
    assert compiled == []
