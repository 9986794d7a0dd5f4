"""Sparse MLA prefill against FlashMLA, from CUDA-graph replays.

With 32 heads, FlashMLA's queries are padded to 64, as vLLM pads them.
"""

from __future__ import annotations

import argparse
import functools

from benchmarks import harness
from benchmarks.contest import contest
from benchmarks.sparse_mla import flashmla, inputs
from benchmarks.sparse_mla.definition import TOLERANCE, definition_error
from vllm_sm12x.lowering import target_key
from vllm_sm12x.ops.sparse_mla import sparse_mla_prefill
from vllm_sm12x.ops.sparse_mla.config_prefill import PrefillConfig, prefill_config
from vllm_sm12x.ops.sparse_mla.prefill_kernel import sparse_mla_prefill as kernel

ROWS = 32_768

# The shape of the goal first; then more and fewer tokens, and more and fewer keys.
SHAPES = [(4096, 640), (512, 640), (1024, 640), (2048, 640), (8192, 640)]
SHAPES += [(4096, 128), (4096, 256), (4096, 1152), (4096, 2176)]


def tilings(lowering: str) -> list[PrefillConfig]:
    """What ``--try`` times."""
    gluon = [
        PrefillConfig(32, 16, True, 4, 2, parts=2),
        PrefillConfig(32, 16, True, 4, 2, parts=4),
    ]
    small = [
        PrefillConfig(64, 16, True, 8, 3),
        PrefillConfig(64, 16, True, 8, 2),
        PrefillConfig(32, 16, True, 4, 2),
        PrefillConfig(32, 16, True, 4, 3),
        PrefillConfig(32, 32, False, 4, 3),
        PrefillConfig(32, 32, True, 8, 3),
        PrefillConfig(16, 32, False, 4, 2),
        PrefillConfig(16, 64, False, 8, 2),
    ]
    large = [
        PrefillConfig(64, 64, False, 8, 2),
        PrefillConfig(64, 32, False, 8, 2),
        PrefillConfig(64, 32, False, 8, 3),
        PrefillConfig(64, 64, False, 4, 2),
        PrefillConfig(64, 16, True, 8, 3),
    ]
    return gluon + (large if lowering == "native" else small)


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--heads", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first N shapes")
    parser.add_argument("--try", dest="tilings", action="store_true", help="time other tilings")
    arguments = parser.parse_args()
    report = harness.Report(arguments)
    for heads in arguments.heads:
        for tokens, keys in SHAPES[: arguments.shapes]:
            sets = [inputs.prefill(tokens, heads, keys, ROWS, seed) for seed in range(2)]
            bench(sets, heads, tokens, keys, arguments, report)


def bench(
    sets: list[dict],
    heads: int,
    tokens: int,
    keys: int,
    arguments: argparse.Namespace,
    report: harness.Report,
) -> None:
    native = {}
    if flashmla.available():
        native["FlashMLA"] = [flashmla.Prefill(**each) for each in sets]

    def ours(lowering: str) -> tuple[str, dict[str, list]]:
        chosen = prefill_config(target_key(), heads)
        configs = [chosen, *(tilings(lowering) if arguments.tilings else ())]
        return describe(chosen), {
            describe(config): [functools.partial(kernel, config=config, **each) for each in sets]
            for config in configs
        }

    contest(
        report,
        dict(op="sparse_mla_prefill", heads=heads, tokens=tokens, keys=keys),
        native=native,
        ours=ours,
        error=definition_error(sets[0], sparse_mla_prefill),
        tolerance=TOLERANCE,
        work=dict(flops=inputs.prefill_flops(tokens, heads, keys)),
        lowerings=arguments.lowering,
    )


def describe(config: PrefillConfig) -> str:
    sides = "nh" if config.keys_first else "hn"
    parts = f" p{config.parts}" if config.parts else ""
    return (
        f"{config.block_h}x{config.block_n}{sides} w{config.num_warps} s{config.num_stages}{parts}"
    )


if __name__ == "__main__":
    main()
