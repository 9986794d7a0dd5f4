"""Sparse MLA prefill against FlashMLA, from CUDA-graph replays.

``relative_rate`` is FlashMLA's time over ours. With 32 heads its queries are padded to 64, as
vLLM pads them.
"""

from __future__ import annotations

import functools

from benchmarks import harness
from benchmarks.sparse_mla import flashmla, inputs
from benchmarks.sparse_mla.measuring import measure
from vllm_sm12x.ops.sparse_mla import sparse_mla_prefill
from vllm_sm12x.ops.sparse_mla.config_prefill import PrefillConfig
from vllm_sm12x.ops.sparse_mla.prefill_kernel import sparse_mla_prefill as kernel

ROWS = 32_768

# The shape of the goal first; then more and fewer tokens, and more and fewer keys.
SHAPES = [(4096, 640), (512, 640), (1024, 640), (2048, 640), (8192, 640)]
SHAPES += [(4096, 128), (4096, 256), (4096, 1152), (4096, 2176)]


def tilings(lowering: str) -> list[PrefillConfig]:
    """What ``--try`` times."""
    gluon = [
        PrefillConfig(64, 16, True, 8, 4, parts=2),
        PrefillConfig(64, 16, True, 8, 5, parts=2),
        PrefillConfig(32, 16, True, 4, 3, parts=2),
        PrefillConfig(32, 16, True, 8, 4, parts=2),
        PrefillConfig(16, 16, True, 8, 4, parts=4),
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
    native = flashmla.available()
    for heads in arguments.heads:
        for tokens, keys in SHAPES[: arguments.shapes]:
            sets = [inputs.prefill(tokens, heads, keys, ROWS, seed) for seed in range(2)]
            flops = inputs.prefill_flops(tokens, heads, keys)
            about = dict(op="sparse_mla_prefill", heads=heads, tokens=tokens, keys=keys)
            candidates = {}
            if native:
                candidates["flashmla"] = [flashmla.Prefill(**each) for each in sets]
            for lowering in arguments.lowering or harness.LOWERINGS:
                ours = {}
                if arguments.tilings:
                    for config in tilings(lowering):
                        label = "x".join(
                            map(str, (config.block_h, config.block_n, config.num_warps))
                        )
                        label += (
                            f"/{config.num_stages}/{'kh'[not config.keys_first]}/{config.parts}"
                        )
                        ours[label] = [
                            functools.partial(kernel, config=config, **each) for each in sets
                        ]
                else:
                    ours["table"] = [
                        functools.partial(sparse_mla_prefill, implementation="triton", **each)
                        for each in sets
                    ]
                with harness.use_lowering(lowering):
                    for label, calls in ours.items():
                        row = dict(about, lowering=lowering, tiling=label)
                        out = sets[0]["out"]
                        measure(report, row, calls, candidates, out, dict(flops=flops), _relation)


def _relation(ours_us: float, native_us: float) -> dict[str, float]:
    return {"relative_rate": round(native_us / ours_us, 3)}


if __name__ == "__main__":
    main()
