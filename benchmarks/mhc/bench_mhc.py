"""Hyper-connections of one layer, DeepSeek V4 Flash's: ``mhc_fused_post_pre`` twice, with norms.

``--native`` adds TileLang's kernels as vLLM calls them, with DeepGEMM's product where it is
supported and without; that needs the whole of vLLM, and TileLang compiles for minutes. ``--try``
times launch parameters that are not in the tables as well. ``--first-call FOLDER``
times the first call of each instead, and compiles into that new folder.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.contest import contest, relative_error
from benchmarks.engine import startup
from vllm_sm12x import lowering
from vllm_sm12x.ops.mhc import launch, reference
from vllm_sm12x.ops.mhc.config import FinishConfig, MixConfig, configs

M, H, OUTPUTS = 4, 4096, 24
TOKENS = (1, 8, 24, 64, 512, 4096)
# Epsilons of the mean square, the gates and the iteration, factor of the post weights, rounds.
CONSTANTS = (1e-6, 1e-6, 1e-6, 2.0, 20)
NORM_EPS = 1e-6

# Bytes that the mappings of all input sets have together: several times the L2 cache, as those of
# the 43 layers have.
MAPPING_BYTES = 160 * 2**20

Inputs = tuple[torch.Tensor, ...]
Configs = tuple[MixConfig, FinishConfig]


def draw(tokens: int, seed: int) -> Inputs:
    """x, residual, post weights, mix matrices, mapping, its scale and base, the norm's weight."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    return (
        normal(tokens, H).bfloat16(),
        normal(tokens, M, H).bfloat16(),
        torch.rand(tokens, M, 1, generator=generator, device="cuda"),
        torch.rand(tokens, M, M, generator=generator, device="cuda") / M,
        normal(OUTPUTS, M * H) / 64,
        normal(3),
        normal(OUTPUTS),
        normal(H).bfloat16(),
    )


def ours(given: Inputs, config: Configs) -> tuple[torch.Tensor, ...]:
    *first, weight = given
    return launch.mhc_fused_post_pre(*first, *CONSTANTS, weight, NORM_EPS, config)


def tilelang(deep_gemm: bool) -> Callable[[Inputs], tuple[torch.Tensor, ...]]:
    """vLLM's own function; ``deep_gemm``: as on Hopper, otherwise as on SM12x."""
    from vllm.model_executor.kernels.mhc import tilelang
    from vllm.utils import deep_gemm as module

    supported = module.is_deep_gemm_supported

    def call(given: Inputs) -> tuple[torch.Tensor, ...]:
        *first, weight = given
        module.is_deep_gemm_supported = lambda: deep_gemm
        try:
            return tilelang.mhc_fused_post_pre_tilelang(
                *first, *CONSTANTS, norm_weight=weight, norm_eps=NORM_EPS
            )
        finally:
            module.is_deep_gemm_supported = supported

    return call


def worst_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest relative error of the results."""
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def variants(chosen: Configs, tokens: int) -> list[Configs]:
    """Launch parameters to try, mostly one thing changed at a time."""
    mix, finish = chosen
    change = dataclasses.replace
    if tokens <= 16:
        others = [
            change(mix, num_warps=4),
            change(mix, block_h=64, splits=64, num_warps=4),
            change(mix, block_h=64, splits=64, num_warps=8),
            change(mix, block_t=32, num_warps=4),
        ]
        finishes = [change(finish, num_warps=warps) for warps in (2, 8)]
    elif tokens <= 64:
        others = [
            change(mix, block_t=16, num_warps=2),
            change(mix, block_t=16, num_warps=4),
            change(mix, block_t=16, block_h=64, splits=64, num_warps=4),
            change(mix, block_h=64, splits=64, num_warps=8),
            change(mix, num_warps=8),
        ]
        finishes = [change(finish, num_warps=8), change(finish, mix_t=2)]
    else:
        others = [
            change(mix, splits=mix.splits // 2),
            change(mix, splits=mix.splits * 2),
            change(mix, num_stages=2),
            change(mix, halved=False),
            change(mix, num_warps=8),
            change(mix, block_t=32, num_warps=2),
            change(mix, block_t=32, num_warps=4),
            change(mix, block_t=128, num_warps=8, num_stages=2),
        ]
        finishes = [change(finish, num_warps=8), change(finish, mix_t=finish.mix_t // 2)]
        if tokens <= 512:
            # One step a part.
            one = change(mix, splits=128, num_stages=1, halved=False)
            others += [change(one, block_t=32), change(one, block_h=64, splits=64, num_warps=8)]
    return [(other, finish) for other in others] + [(mix, other) for other in finishes]


def describe(config: Configs) -> str:
    mix, finish = config
    halved = " halved" if mix.halved else ""
    return (
        f"{mix.block_t}x{mix.block_h} /{mix.splits} w{mix.num_warps} s{mix.num_stages}{halved}"
        f", {finish.mix_t} w{finish.num_warps}"
    )


def needed_bytes(tokens: int) -> int:
    """Of one layer: streams and outputs read, streams and inputs written, mapping; twice."""
    streams, vector = 2 * tokens * M * H, 2 * tokens * H
    return 2 * (2 * streams + 2 * vector + 4 * OUTPUTS * M * H)


def bench(tokens: int, arguments, report: harness.Report) -> None:
    number = max(4, MAPPING_BYTES // (4 * OUTPUTS * M * H)) if tokens <= 512 else 4
    sets = [draw(tokens, seed) for seed in range(number)]
    *first, weight = sets[0]
    expected = reference.mhc_fused_post_pre(*first, *CONSTANTS, weight, NORM_EPS)
    native: dict[str, Callable[[Inputs], object]] = {}
    if arguments.native:
        native = {"TileLang": tilelang(False), "TileLang, DeepGEMM": tilelang(True)}

    def on_sets(call: Callable[[Inputs], object]) -> list:
        return [functools.partial(call, given) for given in sets]

    def ours_in(_: str) -> tuple[str, dict[str, list]]:
        chosen = configs(lowering.target_key(), tokens)
        tried = [chosen, *(variants(chosen, tokens) if arguments.trying else ())]
        calls = {
            describe(config): on_sets(functools.partial(ours, config=config)) for config in tried
        }
        return describe(chosen), calls

    contest(
        report,
        dict(op="mhc layer", tokens=tokens),
        native={label: on_sets(call) for label, call in native.items()},
        ours=ours_in,
        error=lambda call: worst_error(call(), expected),
        # Results are bfloat16, and a layer's input is rounded twice.
        tolerance=2**-7,
        work=dict(nbytes=needed_bytes(tokens)),
        lowerings=arguments.lowering,
        # One layer has two of these, and a mapping for each.
        unit=2,
        repeats=9,
    )


def first_calls(tokens: Sequence[int], arguments, report: harness.Report) -> None:
    """Seconds of the first call at each number of tokens: compiling, loading, running.

    In this order, so that what a number of tokens shares with those before it is not counted again.
    """
    names = arguments.lowering or harness.LOWERINGS
    calls = [(name, functools.partial(ours_of, name)) for name in names]
    if arguments.native:
        calls.append(("", tilelang(True)))
    for name, call in calls:
        for number in tokens:
            given = draw(number, 0)
            torch.cuda.synchronize()
            began = time.perf_counter()
            call(given)
            torch.cuda.synchronize()
            report.rows(
                [
                    dict(
                        op="mhc first call",
                        tokens=number,
                        lowering=name,
                        candidate="tables" if name else "TileLang, DeepGEMM",
                        seconds=round(time.perf_counter() - began, 3),
                    )
                ]
            )


def ours_of(lowering_name: str, given: Inputs) -> None:
    """What the tables choose, in one lowering."""
    with harness.use_lowering(lowering_name):
        ours(given, configs(lowering.target_key(), len(given[0])))


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--native", action="store_true", help="TileLang's kernels too")
    parser.add_argument("--try", dest="trying", action="store_true", help="time more rows")
    parser.add_argument("--tokens", type=int, action="append", help="may be repeated")
    parser.add_argument(
        "--first-call", type=Path, metavar="FOLDER", help="time first calls, and nothing else"
    )
    arguments = parser.parse_args()
    report = harness.Report(arguments)
    if arguments.first_call:
        if not startup.is_cold(arguments.first_call):
            parser.error(f"--first-call {arguments.first_call}: holds files, allowed: a new folder")
        os.environ.update(startup.make(arguments.first_call))
        first_calls(arguments.tokens or TOKENS, arguments, report)
        return
    for tokens in arguments.tokens or TOKENS:
        bench(tokens, arguments, report)


if __name__ == "__main__":
    main()
