"""Decode logits of the indexer beside DeepGEMM's, from CUDA-graph replays.

``--try`` times tilings that are not in the table as well. The schedule that DeepGEMM wants is made
before, as vLLM makes it once a step for all layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks import harness
from benchmarks.contest import contest, relative_error
from vllm_sm12x import lowering
from vllm_sm12x.ops.paged_mqa_logits import (
    BLOCK_SIZE,
    HEAD_DIM,
    TOKEN_BYTES,
    config,
    kernel,
    page_bytes,
    reference,
)
from vllm_sm12x.ops.paged_mqa_logits.config import Row

# Requests, query tokens of each, keys of each, columns of the result. Those of the goal first.
SHAPES = [
    (1, 1, 32_768, 32_768),
    (8, 1, 32_768, 32_768),
    (24, 1, 32_768, 32_768),
    (1, 1, 1024, 262_144),
    (1, 1, 32_768, 262_144),
    (1, 1, 262_144, 262_144),
    (24, 1, 1024, 262_144),
    (24, 1, 4096, 32_768),
    (8, 3, 32_768, 32_768),
    (96, 1, 8192, 32_768),
]

# Pages of the cache: several times the L2 cache, through which the input sets go.
PAGES = 24_576
MOST_SETS = 24

Call = Callable[[], torch.Tensor]


@functools.cache
def cache() -> torch.Tensor:
    """A cache of random keys, pages apart as vLLM has them."""
    generator = torch.Generator("cuda").manual_seed(0)
    kinds = dict(generator=generator, device="cuda")
    raw = torch.zeros(PAGES, page_bytes(), dtype=torch.uint8, device="cuda")
    for pages in raw.split(4096):
        keys = torch.randn(len(pages), BLOCK_SIZE * HEAD_DIM, **kinds) * 60
        pages[:, : keys.shape[1]] = keys.to(torch.float8_e4m3fn).view(torch.uint8)
        scales = torch.exp2(torch.randint(-9, -5, (len(pages), BLOCK_SIZE), **kinds).float())
        pages[:, keys.shape[1] : BLOCK_SIZE * TOKEN_BYTES] = scales.view(torch.uint8)
    shape = (PAGES, BLOCK_SIZE, 1, TOKEN_BYTES)
    return raw.as_strided(shape, (page_bytes(), TOKEN_BYTES, TOKEN_BYTES, 1))


def draw(shape: tuple[int, int, int, int], heads: int) -> list[dict]:
    """Arguments of ``fp8_paged_mqa_logits``, several times, on pages of their own."""
    requests, next_n, keys, columns = shape
    generator = torch.Generator("cuda").manual_seed(1)
    kinds = dict(generator=generator, device="cuda")
    used = -(-keys // BLOCK_SIZE)
    sets = max(1, min(MOST_SETS, PAGES // (requests * used)))
    pages = torch.randperm(PAGES, **kinds).int()
    given = []
    for number in range(sets):
        table = torch.zeros(requests, columns // BLOCK_SIZE, dtype=torch.int32, device="cuda")
        mine = torch.arange(requests * used, device="cuda") + number * requests * used
        table[:, :used] = pages[mine % PAGES].view(requests, used)
        behind = torch.arange(1 - next_n, 1, dtype=torch.int32, device="cuda")
        given.append(
            dict(
                q=torch.randn(requests, next_n, heads, HEAD_DIM, **kinds).to(torch.float8_e4m3fn),
                kv_cache=cache(),
                weights=torch.randn(requests * next_n, heads, **kinds) * 0.01,
                context_lens=(keys + behind).expand(requests, next_n).contiguous(),
                block_tables=table,
                max_model_len=columns,
            )
        )
    return given


def work(shape: tuple[int, int, int, int], heads: int) -> dict[str, float]:
    """Operations and bytes of the definition."""
    requests, next_n, keys, _ = shape
    rows = requests * next_n
    nbytes = requests * keys * TOKEN_BYTES + rows * (4 * keys + heads * (HEAD_DIM + 4))
    return dict(flops=2.0 * rows * keys * heads * HEAD_DIM, nbytes=nbytes)


class Definition:
    """The logits of one input set in float32."""

    def __init__(self, given: dict) -> None:
        self._logits = reference.fp8_paged_mqa_logits(**given, clean_logits=False)
        column = torch.arange(given["max_model_len"], device="cuda")
        self._inside = column < given["context_lens"].reshape(-1, 1)

    def error(self, call: Call) -> float:
        return relative_error(call()[self._inside], self._logits[self._inside])


@functools.cache
def _deep_gemm():
    try:
        from vllm.third_party import deep_gemm
    except ImportError as error:
        print(f"no DeepGEMM: {error}")
        return None
    return deep_gemm


def native(given: dict) -> Call | None:
    """DeepGEMM's kernel, where it is installed."""
    deep_gemm = _deep_gemm()
    if deep_gemm is None:
        return None
    lens = given["context_lens"]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lens, BLOCK_SIZE, processors)
    return functools.partial(
        deep_gemm.fp8_fp4_paged_mqa_logits,
        (given["q"], None),
        given["kv_cache"],
        given["weights"],
        lens,
        given["block_tables"],
        schedule,
        given["max_model_len"],
        clean_logits=False,
    )


def tilings(name: str) -> list[Row]:
    """What ``--try`` times beside the table's row, for a lowering."""
    if name == "native":
        return [
            Row(2, 4, 5, 2),
            Row(2, 4, 5, 3),
            Row(2, 4, 5, 4),
            Row(2, 4, 7, 2),
            Row(1, 4, 5, 4),
            Row(1, 4, 5, 6),
            Row(1, 4, 7, 4),
            Row(1, 4, 9, 3),
        ]
    return [
        Row(2, 4, 5, 2),
        Row(2, 4, 5, 3, 168),
        Row(2, 4, 5, 4, 128),
        Row(2, 4, 7, 2),
        # As many blocks as fit on SM12x.
        Row(1, 2, 5, 3),
        Row(1, 2, 5, 4),
        Row(1, 2, 5, 5),
        Row(1, 2, 5, 6, 168),
        Row(1, 2, 7, 5),
    ]


def describe(row: Row) -> str:
    bound = "" if row.maxnreg is None else f" r{row.maxnreg}"
    return f"{row.pages} w{row.num_warps} s{row.num_stages} p{row.programs}{bound}"


def bench(
    shape: tuple[int, int, int, int],
    heads: int,
    lowerings: list[str] | None,
    trying: bool,
    report: harness.Report,
) -> None:
    requests, next_n, keys, columns = shape
    sets = draw(shape, heads)
    definition = Definition(sets[0])
    theirs = [call for call in map(native, sets) if call is not None]

    def ours(name: str) -> tuple[str, dict[str, list[Call]]]:
        chosen = config.row(requests * next_n, heads, lowering.target_key())
        rows = [chosen]
        if trying:
            rows += [row for row in tilings(name) if row != chosen]
        call = functools.partial(kernel.fp8_paged_mqa_logits, clean_logits=False)
        return describe(chosen), {
            describe(row): [functools.partial(call, **given, row=row) for given in sets]
            for row in rows
        }

    contest(
        report,
        dict(
            op="paged_mqa_logits",
            requests=requests,
            next_n=next_n,
            keys=keys,
            columns=columns,
            heads=heads,
        ),
        native={"DeepGEMM": theirs} if theirs else {},
        ours=ours,
        error=definition.error,
        tolerance=2**-8,
        work=work(shape, heads),
        lowerings=lowerings,
        repeats=9,
        graph_us=500,
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
