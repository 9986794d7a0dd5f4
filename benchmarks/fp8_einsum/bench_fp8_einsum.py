"""The grouped FP8 einsum at DeepSeek V4 Flash's shape, beside DeepGEMM.

``--try`` times tilings that are not in the table as well.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch

from benchmarks import harness
from benchmarks.contest import contest, relative_error
from vllm_sm12x import lowering
from vllm_sm12x.ops.fp8_einsum import kernel, reference
from vllm_sm12x.ops.fp8_einsum.config import EinsumConfig, einsum_config

GROUPS, N, K, BLOCK = 8, 1024, 4096, 128
TOKENS = (1, 8, 12, 24, 64, 256, 1024, 4096)

# Sets of inputs that take turns: their weights together are several times the L2 cache.
SETS = 4

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def draw(tokens: int, seed: int) -> Inputs:
    """As the engine has them: groups outermost, the scales' tokens innermost."""
    generator = torch.Generator("cuda").manual_seed(seed)
    kinds = dict(generator=generator, device="cuda")
    padded = -(-tokens // 4) * 4
    a = torch.randn(GROUPS, tokens, K, **kinds).mul_(100).clamp_(-448, 448)
    b = torch.randn(GROUPS, N, K, **kinds).mul_(100).clamp_(-448, 448)
    a_scale = torch.exp2((torch.rand(GROUPS, K // BLOCK, padded, **kinds) * 4).floor() - 9)
    b_scale = torch.exp2((torch.rand(GROUPS, N // BLOCK, K // BLOCK, **kinds) * 4).floor() - 9)
    return (
        a.to(torch.float8_e4m3fn).transpose(0, 1),
        a_scale.permute(2, 0, 1)[:tokens],
        b.to(torch.float8_e4m3fn),
        b_scale,
        torch.full((tokens, GROUPS, N), torch.nan, dtype=torch.bfloat16, device="cuda"),
    )


def native() -> Callable[..., None] | None:
    """DeepGEMM's einsum, where it is installed."""
    try:
        from vllm.third_party import deep_gemm
    except ImportError as error:
        print(f"no DeepGEMM: {error}")
        return None

    def call(a, a_scale, b, b_scale, out):
        equation = "bhr,hdr->bhd"
        deep_gemm.fp8_einsum(equation, (a, a_scale), (b, b_scale), out, recipe=(1, 128, 128))

    return call


def few(block_t: int, block_n: int, warps: int, stages: int, dependent: bool = True):
    """A tiling for few tokens: a warp a part."""
    return EinsumConfig(block_t, block_n, True, warps, stages, parts=warps, dependent=dependent)


def variants(tokens: int, name: str) -> list[EinsumConfig]:
    """Tilings to try for a number of tokens and a lowering."""
    if tokens <= 16:
        t = 8 if tokens <= 8 else 16
        return [
            few(t, 32, 4, 3, dependent=False),
            few(t, 32, 4, 4),
            few(t, 16, 4, 4),
            few(t, 64, 4, 3),
            few(t, 32, 8, 2),
            few(t, 32, 8, 3),
            few(t, 16, 8, 3),
            # All warps on one block of inputs.
            EinsumConfig(max(t, 16), 64, True, 4, 6)
            if name == "native"
            else EinsumConfig(t, 32, True, 2, 6),
        ]
    if tokens <= 32:
        return [
            few(32, 32, 4, 3, dependent=False),
            few(32, 32, 4, 2),
            few(32, 32, 4, 4),
            few(32, 64, 4, 3),
            few(32, 16, 4, 3),
            few(32, 32, 8, 2),
            EinsumConfig(32, 64, True, 4, 6),
            EinsumConfig(32, 32, True, 2, 5),
        ]
    if tokens <= 256:
        shapes = [(64, 64, True, 4), (64, 128, False, 4), (64, 64, False, 4)]
        found = [EinsumConfig(*shape, stages) for shape in shapes for stages in (3, 5)]
        return [*found, few(32, 32, 4, 3), few(64, 16, 4, 3)]
    if name == "native":
        return [
            EinsumConfig(64, 128, False, 4, 3),
            EinsumConfig(64, 128, False, 4, 4),
            EinsumConfig(64, 128, False, 4, 4, maxnreg=168),
            EinsumConfig(128, 64, False, 4, 3),
            EinsumConfig(128, 64, False, 4, 3, maxnreg=168),
        ]
    return [
        EinsumConfig(64, 64, False, 4, 3),
        EinsumConfig(64, 64, False, 4, 3, maxnreg=168),
        EinsumConfig(128, 64, False, 4, 3),
        EinsumConfig(128, 128, False, 8, 3),
        EinsumConfig(64, 128, True, 4, 3),
    ]


def describe(config: EinsumConfig) -> str:
    order = "nt" if config.weights_first else "tn"
    more = f" p{config.parts}" if config.parts > 1 else ""
    more += " dep" if config.dependent else ""
    more += f" r{config.maxnreg}" if config.maxnreg else ""
    return (
        f"{config.block_t}x{config.block_n}{order} w{config.num_warps} s{config.num_stages}{more}"
    )


def bench(tokens: int, lowerings: list[str] | None, trying: bool, report: harness.Report) -> None:
    sets = [draw(tokens, seed) for seed in range(SETS if tokens <= 1024 else 2)]
    expected = torch.empty_like(sets[0][-1], dtype=torch.float32)
    reference.fp8_einsum_bhr_hdr(*sets[0][:-1], expected)
    out = sets[0][-1]
    deep_gemm = native()

    def error(call: Callable[[], object]) -> float:
        out.fill_(torch.nan)
        call()
        return relative_error(out, expected)

    def ours(name: str) -> tuple[str, dict[str, list]]:
        chosen = einsum_config(lowering.target_key(), tokens)
        configs = [chosen]
        if trying:
            configs += [other for other in variants(tokens, name) if other != chosen]
        return describe(chosen), {
            describe(config): [
                functools.partial(kernel.fp8_einsum_bhr_hdr, *given, config=config)
                for given in sets
            ]
            for config in configs
        }

    contest(
        report,
        dict(op="fp8_einsum", tokens=tokens),
        native={"DeepGEMM": [functools.partial(deep_gemm, *given) for given in sets]}
        if deep_gemm
        else {},
        ours=ours,
        error=error,
        tolerance=2**-8,
        work=dict(
            flops=2.0 * tokens * GROUPS * N * K, nbytes=sum(tensor.nbytes for tensor in sets[0])
        ),
        lowerings=lowerings,
        repeats=9,
    )


def main() -> None:
    parser: argparse.ArgumentParser = harness.argument_parser(__doc__)
    parser.add_argument("--try", dest="trying", action="store_true", help="time more tilings")
    parser.add_argument("--tokens", type=int, action="append", help="may be repeated")
    arguments = parser.parse_args()
    report = harness.Report(arguments)
    for tokens in arguments.tokens or TOKENS:
        bench(tokens, arguments.lowering, arguments.trying, report)


if __name__ == "__main__":
    main()
