"""Sparse MLA decode against FlashMLA, from CUDA-graph replays.

FlashMLA has no kernel for fewer than 64 heads: with 32 its queries are padded, as vLLM pads them.
``relative_error`` is ``|ours - FlashMLA| / |FlashMLA|`` over the whole result.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from benchmarks import harness
from benchmarks.sparse_mla import flashmla, inputs
from benchmarks.sparse_mla.measuring import measure
from vllm_sm12x.lowering import multiprocessors
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


def tilings() -> list[config_decode.Row]:
    """What ``--try`` times."""
    rows = [
        config_decode.Row(16, 32),
        config_decode.Row(16, 16),
        config_decode.Row(16, 16, maxnreg=128),
        config_decode.Row(32, 16),
        config_decode.Row(32, 32),
        config_decode.Row(64, 16, parts=2),
        config_decode.Row(32, 16, parts=2),
        config_decode.Row(16, 16, parts=4),
    ]
    return [replace(row, programs=programs) for row in rows for programs in (1, 2)]


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--heads", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 3, 12, 24, 96])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--try", dest="tilings", action="store_true", help="time other tilings")
    arguments = parser.parse_args()
    report = harness.Report(arguments)
    native = flashmla.available()
    for heads in arguments.heads:
        for name in arguments.case:
            kind, compressed = CASES[name]
            for tokens in arguments.tokens:
                sets = [
                    inputs.decode(tokens, heads, kind, compressed, seed)
                    for seed in range(INPUT_SETS)
                ]
                keys = 128 + compressed
                work = dict(
                    flops=inputs.decode_flops(tokens, heads, keys),
                    nbytes=inputs.decode_bytes(tokens, heads, keys),
                )
                about = dict(op="sparse_mla_decode", case=name, heads=heads, tokens=tokens)
                candidates = {}
                if native:
                    candidates["flashmla"] = [flashmla.Decode(**each) for each in sets]
                for lowering in arguments.lowering or harness.LOWERINGS:
                    ours = {}
                    if arguments.tilings:
                        for row in tilings():
                            splits = config_decode.splits(
                                row, tokens, heads, keys, multiprocessors()
                            )
                            label = (
                                f"{row.block_h}x{row.block_n}/{row.parts}/{row.maxnreg}/{splits}"
                            )
                            ours[label] = [
                                functools.partial(_tiling, each, row, splits) for each in sets
                            ]
                    else:
                        ours["table"] = [
                            functools.partial(sparse_mla_decode, implementation="triton", **each)
                            for each in sets
                        ]
                    with harness.use_lowering(lowering):
                        for label, calls in ours.items():
                            row = dict(about, lowering=lowering, tiling=label)
                            out = sets[0]["out"]
                            measure(report, row, calls, candidates, out, work, _relation)


def _tiling(arguments: dict, row: config_decode.Row, splits: int) -> None:
    names = ("swa_cache", "swa_indices", "swa_lens", "extra_cache", "extra_indices", "extra_lens")
    values = [arguments[name] for name in names if name in arguments]
    sets = [tuple(values[i : i + 3]) for i in range(0, len(values), 3)]
    q, sink, out = (arguments[name] for name in ("q", "attn_sink", "out"))
    kernel(q, sets, sink, arguments["softmax_scale"], out, row=row, splits=splits)


def _relation(ours_us: float, native_us: float) -> dict[str, float]:
    return {"ratio": round(ours_us / native_us, 3)}


if __name__ == "__main__":
    main()
