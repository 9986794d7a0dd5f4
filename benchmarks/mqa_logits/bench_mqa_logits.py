"""Prefill logits of the indexer beside DeepGEMM's, from CUDA-graph replays.

``--try`` times tilings that are not in the table as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks import harness
from benchmarks.contest import contest, relative_error
from vllm_sm12x import lowering
from vllm_sm12x.ops.mqa_logits import HEAD_DIM, config, kernel, reference
from vllm_sm12x.ops.mqa_logits.config import Row

# Tokens, keys, and whether each token sees all keys or, at 4 tokens a key, those before it. The
# shape of the goal first.
SHAPES = [
    (4096, 32_768, False),
    (4096, 32_768, True),
    (512, 32_768, False),
    (64, 32_768, False),
    (4096, 8192, False),
    (4096, 1024, True),
    (2048, 131_072, False),
]

# Tokens whose logits are compared with the definition.
_CHECKED = 48

Call = Callable[[], torch.Tensor]


def draw(tokens: int, keys: int, heads: int, causal: bool, seed: int = 0) -> dict:
    """Arguments of ``fp8_mqa_logits``."""
    generator = torch.Generator("cuda").manual_seed(seed)
    kinds = dict(generator=generator, device="cuda")
    ends = torch.full((tokens,), keys, dtype=torch.int32, device="cuda")
    if causal:
        behind = torch.arange(tokens - 1, -1, -1, dtype=torch.int32, device="cuda")
        ends -= behind // 4
    return dict(
        q=torch.randn(tokens, heads, HEAD_DIM, **kinds).to(torch.float8_e4m3fn),
        k=torch.randn(keys, HEAD_DIM, **kinds).mul_(60).to(torch.float8_e4m3fn),
        k_scale=torch.exp2(torch.randint(-9, -5, (keys,), **kinds).float()),
        weights=torch.randn(tokens, heads, **kinds) * 0.01,
        ks=torch.zeros_like(ends),
        ke=ends,
    )


def pairs(given: dict) -> int:
    """Pairs of token and key to score."""
    return int((given["ke"] - given["ks"]).clamp_(min=0).sum())


def work(given: dict) -> dict[str, float]:
    """Operations and bytes of the definition."""
    heads = given["q"].shape[1]
    inputs = sum(tensor.nbytes for tensor in given.values())
    return dict(
        flops=2.0 * pairs(given) * heads * HEAD_DIM,
        nbytes=inputs + 4.0 * pairs(given),
    )


class Definition:
    """The logits of some tokens, spread over all of them, in float32."""

    def __init__(self, given: dict) -> None:
        tokens, keys = len(given["q"]), len(given["k"])
        self._rows = torch.linspace(0, tokens - 1, min(tokens, _CHECKED)).long().cuda()
        rows = {name: given[name][self._rows] for name in ("weights", "ks", "ke")}
        q = given["q"].view(torch.uint8)[self._rows].view(torch.float8_e4m3fn)
        self._logits = reference.fp8_mqa_logits(
            q, given["k"], given["k_scale"], **rows, clean_logits=False
        )
        column = torch.arange(keys, device="cuda")
        self._inside = (column >= rows["ks"][:, None]) & (column < rows["ke"][:, None])

    def error(self, call: Call) -> float:
        found = call()[self._rows]
        return relative_error(found[self._inside], self._logits[self._inside])


def native(given: dict) -> Call | None:
    """DeepGEMM's kernel, where it is installed."""
    try:
        from vllm.third_party import deep_gemm
    except ImportError as error:
        print(f"no DeepGEMM: {error}")
        return None
    arguments = (given[name] for name in ("weights", "ks", "ke"))
    call = functools.partial(
        deep_gemm.fp8_fp4_mqa_logits, (given["q"], None), (given["k"], given["k_scale"])
    )
    return functools.partial(call, *arguments, clean_logits=False)


def tilings(name: str) -> list[Row]:
    """What ``--try`` times beside the table's row, for a lowering."""
    if name == "native":
        return [
            Row(128, 1, 4, 3),
            Row(128, 1, 4, 4),
            Row(128, 1, 4, 3, 128),
            Row(128, 2, 4, 3),
            Row(64, 1, 4, 3),
            Row(64, 2, 4, 3),
            Row(64, 2, 4, 3, 128),
            Row(64, 4, 4, 3),
            Row(128, 2, 8, 3),
            Row(128, 2, 8, 4, 128),
            Row(128, 4, 8, 3),
            Row(256, 1, 8, 3),
            Row(256, 2, 8, 3),
        ]
    return [
        Row(128, 1, 4, 2),
        Row(128, 1, 4, 3),
        Row(128, 1, 4, 4),
        Row(128, 1, 4, 2, 168),
        Row(128, 1, 4, 2, 128),
        Row(64, 1, 2, 3),
        Row(64, 1, 4, 3),
        Row(256, 1, 8, 2),
        Row(256, 1, 8, 2, 128),
        Row(256, 1, 8, 3),
        Row(256, 1, 4, 2),
        Row(128, 2, 4, 2),
    ]


def describe(row: Row) -> str:
    bound = "" if row.maxnreg is None else f" r{row.maxnreg}"
    return f"{row.block_n}x{row.block_q} w{row.num_warps} s{row.num_stages}{bound}"


def bench(
    shape: tuple[int, int, bool],
    heads: int,
    lowerings: list[str] | None,
    trying: bool,
    report: harness.Report,
) -> None:
    tokens, keys, causal = shape
    given = draw(tokens, keys, heads, causal)
    definition = Definition(given)
    theirs = native(given)

    def ours(name: str) -> tuple[str, dict[str, list[Call]]]:
        chosen = config.row(heads, lowering.target_key())
        rows = [chosen]
        if trying:
            rows += [row for row in tilings(name) if row != chosen]
        # The same call for all tilings, so that none is helped by a smaller working set.
        call = functools.partial(kernel.fp8_mqa_logits, **given, clean_logits=False)
        return describe(chosen), {describe(row): [functools.partial(call, row=row)] for row in rows}

    contest(
        report,
        dict(op="mqa_logits", tokens=tokens, keys=keys, causal=causal, heads=heads),
        native={"DeepGEMM": [theirs]} if theirs else {},
        ours=ours,
        error=definition.error,
        tolerance=2**-8,
        work=work(given),
        lowerings=lowerings,
        repeats=7,
    )


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--try", dest="trying", action="store_true", help="time more tilings")
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first N shapes")
    arguments = parser.parse_args()
    report = harness.Report(arguments)
    for shape in SHAPES[: arguments.shapes]:
        bench(shape, arguments.heads, arguments.lowering, arguments.trying, report)


if __name__ == "__main__":
    main()
