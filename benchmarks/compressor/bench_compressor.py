"""The compressor of DeepSeek V4 Flash's keys, C128A's and C4A's.

A prefill of one request, or a decode batch of which every token, or none, ends a group. With
``--native`` vLLM's CuTeDSL kernel runs beside it, and vLLM's Triton kernel, which ours replaces for
C128A; both need vLLM. ``--try`` times other ways through the window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from benchmarks import harness
from benchmarks.contest import contest, relative_error
from vllm_sm12x import lowering
from vllm_sm12x.ops import fp8_ds_mla
from vllm_sm12x.ops.compressor import HEAD_DIM, kernel, reference
from vllm_sm12x.ops.compressor.config import Row, row

# Window's name -> tokens of a group, overlap, tokens of a block of states, entries of a page.
LAYERS = {"C128A": (128, False, 8, 2), "C4A": (4, True, 4, 64)}
# Tokens of a prefill, or of a decode batch.
PREFILLS = (512, 4096)
BATCHES = (1, 24)
TRIED = (Row(4, 4), Row(8, 2), Row(16, 1), Row(16, 2), Row(2, 8), Row(8, 1), Row(4, 2))

# Of all input sets together: several times the L2 cache.
STATE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Inputs:
    """Arguments of ``compress_to_cache``, in order, and the cache among them."""

    arguments: tuple[object, ...]
    cache: torch.Tensor

    @property
    def slots(self) -> torch.Tensor:
        """Of the keys' cache."""
        return self.arguments[9]


def draw(layer: str, positions: torch.Tensor, requests: torch.Tensor, seed: int) -> Inputs:
    """States of all tokens of the windows, behind a shuffled block table.

    Args:
        positions: int64 ``[tokens]``, on the GPU.
        requests: int64 ``[tokens]``: of each token, from 0 on.
    """
    ratio, overlap, block_size, page_size = LAYERS[layer]
    generator = torch.Generator("cuda").manual_seed(seed)
    width = HEAD_DIM * (1 + overlap)
    last, number = int(positions.max()), int(requests.max()) + 1
    per_request = last // block_size + 1
    blocks = number * per_request
    states = torch.randn(blocks, block_size, 2 * width, generator=generator, device="cuda")
    table = torch.randperm(blocks, generator=generator, device="cuda").int()
    angles = torch.rand(last + 1, 32, generator=generator, device="cuda") * 6.3
    tokens = len(positions)
    pages = -(-tokens // page_size)
    memory = torch.zeros(pages, fp8_ds_mla.page_bytes(page_size), dtype=torch.uint8, device="cuda")
    cache = memory.as_strided(
        (pages, page_size, fp8_ds_mla.TOKEN_BYTES),
        (memory.stride(0), fp8_ds_mla.TOKEN_BYTES, 1),
    )
    token = torch.arange(tokens, device="cuda")
    slots = torch.where((positions + 1) % ratio == 0, token, -1)
    return Inputs(
        (
            states,
            requests.int(),
            positions,
            token,
            table.view(number, per_request),
            torch.rand(HEAD_DIM, generator=generator, device="cuda").bfloat16() + 0.5,
            1e-6,
            torch.cat([angles.cos(), angles.sin()], 1),
            cache,
            slots,
            ratio,
            overlap,
        ),
        cache,
    )


def vllms(cutedsl: bool) -> Callable[[Inputs], None]:
    """vLLM's CuTeDSL kernel, or its Triton kernel."""
    if cutedsl:
        from vllm.models.deepseek_v4.nvidia.ops.sparse_attn_compress_cutedsl import (
            compress_norm_rope_store_cutedsl as function,
        )
    else:
        from vllm.models.deepseek_v4.common.ops.fused_compress_quant_cache import (
            compress_norm_rope_store_triton as function,
        )

    def call(given: Inputs) -> None:
        (
            states,
            requests,
            positions,
            token,
            table,
            weight,
            eps,
            angles,
            cache,
            slots,
            ratio,
            twice,
        ) = given.arguments
        function(
            state_cache=states,
            num_actual=len(positions),
            token_to_req_indices=requests,
            positions=positions,
            slot_mapping=token,
            block_table=table,
            block_size=states.size(1),
            state_width=states.size(2) // 2,
            cos_sin_cache=angles,
            kv_cache=cache,
            k_cache_metadata=SimpleNamespace(slot_mapping=slots),
            pdl_kwargs={"launch_pdl": False},
            head_dim=HEAD_DIM,
            rope_head_dim=fp8_ds_mla.ROPE_DIM,
            compress_ratio=ratio,
            overlap=twice,
            use_fp4_cache=False,
            rms_norm_weight=weight,
            rms_norm_eps=eps,
            quant_block=fp8_ds_mla.QUANT_BLOCK,
            token_stride=fp8_ds_mla.DATA_BYTES,
            scale_dim=fp8_ds_mla.SCALE_BYTES,
        )

    return call


def ours(given: Inputs, config: Row) -> None:
    """Our kernel with these launch parameters."""
    kernel.compress_to_cache(*given.arguments, row=config)


def entries(given: Inputs) -> torch.Tensor:
    """float32 ``[entries, 512]``: what stands in the cache."""
    slots = given.slots[given.slots >= 0]
    found = torch.empty(len(slots), HEAD_DIM, device="cuda")
    fp8_ds_mla.dequantize_slots(given.cache, slots, found)
    return found


def error_of(call: harness.Call, given: Inputs, expected: torch.Tensor) -> float:
    """Relative error of what a call writes, root mean square; 0 where it writes nothing."""
    given.cache.zero_()
    call()
    if len(expected) == 0:
        return float(given.cache.count_nonzero() > 0)
    return relative_error(entries(given), expected)


def needed_bytes(given: Inputs) -> int:
    """States of the windows read and entries written; tokens without work cost nothing."""
    count = int((given.slots >= 0).sum())
    *_, ratio, overlap = given.arguments
    window = ratio * (1 + overlap)
    return count * (window * HEAD_DIM * 2 * 4 + fp8_ds_mla.TOKEN_BYTES)


def bench(
    layer: str, what: str, positions: list[int], requests: list[int], arguments, report
) -> None:
    at = torch.tensor(positions, device="cuda")
    of = torch.tensor(requests, device="cuda")
    one = draw(layer, at, of, 0)
    size = one.arguments[0].nbytes
    sets = [one, *(draw(layer, at, of, seed) for seed in range(1, max(2, STATE_BYTES // size)))]
    reference.compress_to_cache(*one.arguments)
    expected = entries(one)
    *_, ratio, overlap = one.arguments
    window = ratio * (1 + overlap)
    native = {"CuTeDSL": vllms(True), "vLLM's Triton": vllms(False)} if arguments.native else {}

    def on_sets(call: Callable[[Inputs], object]) -> list[harness.Call]:
        return [functools.partial(call, given) for given in sets]

    def ours_in(_: str) -> tuple[str, dict[str, list[harness.Call]]]:
        chosen = row(window, lowering.target_key())
        fitting = [other for other in TRIED if window % (other.step * other.groups) == 0]
        rows = dict.fromkeys([chosen, *(fitting if arguments.trying else ())])
        calls = {
            f"{config.step} x {config.groups}": on_sets(functools.partial(ours, config=config))
            for config in rows
        }
        return f"{chosen.step} x {chosen.groups}", calls

    contest(
        report,
        dict(op="compressor", layer=layer, what=what, tokens=len(positions)),
        native={label: on_sets(call) for label, call in native.items()},
        ours=ours_in,
        error=lambda call: error_of(call, one, expected),
        # A code of e4m3 is a step off now and then, where a sum is rounded otherwise.
        tolerance=2**-7,
        work=dict(nbytes=needed_bytes(one)),
        lowerings=arguments.lowering,
    )


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--native", action="store_true", help="vLLM's two kernels too")
    parser.add_argument("--try", dest="trying", action="store_true", help="time more rows")
    parser.add_argument("--layer", action="append", choices=LAYERS, help="may be repeated")
    arguments = parser.parse_args()
    report = harness.Report(arguments)
    for layer in arguments.layer or LAYERS:
        ratio = LAYERS[layer][0]
        for tokens in PREFILLS:
            bench(layer, "prefill", list(range(tokens)), [0] * tokens, arguments, report)
        for tokens in BATCHES:
            requests = list(range(tokens))
            ends = [8 * ratio - 1] * tokens
            bench(layer, "decode, all end", ends, requests, arguments, report)
            inside = [position - 1 for position in ends]
            bench(layer, "decode, none ends", inside, requests, arguments, report)


if __name__ == "__main__":
    main()
