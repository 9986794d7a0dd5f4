"""Sparse MLA decode against FlashMLA, from CUDA-graph replays.

FlashMLA has no kernel for fewer than 64 heads: with 32 its queries are padded, as vLLM pads them.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import replace

from benchmarks import harness
from benchmarks.contest import contest
from benchmarks.sparse_mla import flashmla, inputs
from benchmarks.sparse_mla.definition import TOLERANCE, definition_error
from vllm_sm12x.lowering import multiprocessors, target_key
from vllm_sm12x.ops.sparse_mla import config_decode, sparse_mla_decode
from vllm_sm12x.ops.sparse_mla.decode_kernel import sparse_mla_decode as kernel

# Name -> kind of layer, compressed keys. Contexts are tokens of the request.
CASES = {
    "window": ("window", 0),
    "c4a": ("c4a", 512),
    "c128a-16k": ("c128a", 128),
    "c128a-128k": ("c128a", 1024),
    "c128a-1m": ("c128a", 8192),
}

INPUT_SETS = 4


# What `--try` times, each with as many splits as fill the GPU, half as many and twice as many.
TILINGS = (
    config_decode.Row(16, 16, parts=4),
    config_decode.Row(32, 16, parts=4),
    config_decode.Row(64, 16, parts=4),
)


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--heads", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 3, 12, 24, 96])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--try", dest="tilings", action="store_true", help="time other tilings")
    arguments = parser.parse_args()
    report = harness.Report(arguments)
    for heads in arguments.heads:
        for name in arguments.case:
            kind, compressed = CASES[name]
            for tokens in arguments.tokens:
                sets = [
                    inputs.decode(tokens, heads, kind, compressed, seed)
                    for seed in range(INPUT_SETS)
                ]
                bench(sets, name, heads, tokens, arguments, report)


def bench(
    sets: list[dict],
    case: str,
    heads: int,
    tokens: int,
    arguments: argparse.Namespace,
    report: harness.Report,
) -> None:
    keys = 128 + CASES[case][1]
    native = {}
    if flashmla.available():
        native["FlashMLA"] = [flashmla.Decode(**each) for each in sets]

    def ours(_: str) -> tuple[str, dict[str, list]]:
        chosen = config_decode.row(tokens, heads, keys, target_key())
        fill = functools.partial(
            config_decode.splits,
            tokens=tokens,
            heads=heads,
            keys=keys,
            multiprocessors=multiprocessors(),
        )
        tried = [(chosen, fill(chosen))]
        for row in TILINGS if arguments.tilings else ():
            filled, most = fill(row), fill(replace(row, programs=4))
            tried += [(row, n) for n in {max(1, filled // 2), filled, min(2 * filled, most)}]
        calls = {
            describe(row, splits): [functools.partial(_tiling, each, row, splits) for each in sets]
            for row, splits in tried
        }
        return describe(*tried[0]), calls

    contest(
        report,
        dict(op="sparse_mla_decode", case=case, heads=heads, tokens=tokens),
        native=native,
        ours=ours,
        error=definition_error(sets[0], sparse_mla_decode),
        tolerance=TOLERANCE,
        work=dict(
            flops=inputs.decode_flops(tokens, heads, keys),
            nbytes=inputs.decode_bytes(tokens, heads, keys),
        ),
        lowerings=arguments.lowering,
    )


def describe(row: config_decode.Row, splits: int) -> str:
    bound = "" if row.maxnreg is None else f" r{row.maxnreg}"
    parts = f" p{row.parts}" if row.parts else ""
    return f"{row.block_h}x{row.block_n} w{row.num_warps}{parts} /{splits}{bound}"


def _tiling(arguments: dict, row: config_decode.Row, splits: int) -> None:
    names = ("swa_cache", "swa_indices", "swa_lens", "extra_cache", "extra_indices", "extra_lens")
    values = [arguments[name] for name in names if name in arguments]
    sets = [tuple(values[i : i + 3]) for i in range(0, len(values), 3)]
    q, sink, out = (arguments[name] for name in ("q", "attn_sink", "out"))
    kernel(q, sets, sink, arguments["softmax_scale"], out, row=row, splits=splits)


if __name__ == "__main__":
    main()
