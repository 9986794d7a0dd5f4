"""MXFP4 experts against vLLM's Marlin, from CUDA-graph replays.

Input sets take different experts, and are so many that the touched weights do not stay in the L2
cache. GB/s are over the weights and scales of the experts that a batch touches.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.contest import contest, relative_error
from benchmarks.mxfp4_experts import inputs, marlin
from benchmarks.mxfp4_experts.inputs import INTERMEDIATE, LIMIT, TOP_K, Batch, Layer
from vllm_sm12x.ops.mxfp4_experts import launch, mxfp4_experts
from vllm_sm12x.ops.mxfp4_experts.config import MOST_PAIRS, Product, Row

# Bytes of weights that the input sets touch together, at least; the L2 cache has 50 MB.
SET_BYTES = 600e6

# E4m3 keeps 4 bits of an activation, each product rounds to it once.
TOLERANCES = {"bfloat16": 2**-8, "float8": 0.07}


def tilings(tokens: int, form: str) -> dict[str, Row]:
    """What ``--try`` times, both products alike."""
    if tokens * TOP_K <= MOST_PAIRS:
        shapes = [
            (8, 64, 256, 4, 4),
            (8, 64, 256, 4, 3),
            (8, 64, 128, 4, 6),
            (8, 128, 128, 4, 4),
            (8, 128, 256, 4, 3),
            (8, 128, 256, 8, 3),
        ]
        rows = {_label(shape): _row(shape, MOST_PAIRS) for shape in shapes}
        if tokens * TOP_K <= 32:
            for shape in shapes[0], shapes[3]:
                rows[f"{_label(shape)} of 32 pairs"] = _row(shape, 32)
        for shape in shapes[0], shapes[3]:
            label = f"{_label(shape)} dependent"
            rows[label] = replace(_row(shape, MOST_PAIRS), dependent=True)
        return rows
    if form == "float8":
        shapes = [
            (64, 128, 128, 4, 3),
            (32, 128, 128, 4, 4),
        ]
        return {_label(shape): _row(shape, 0) for shape in shapes}
    shapes = [
        (64, 128, 64, 4, 3),
        (64, 128, 64, 4, 4),
        (64, 128, 64, 4, 3, 168),
        (64, 256, 64, 8, 3),
        (32, 128, 64, 4, 4),
        (32, 256, 64, 4, 3),
        (32, 128, 128, 4, 3),
        (16, 128, 128, 4, 3),
    ]
    rows = {f"{_label(shape)} halves": _row(shape, 0, halves=True) for shape in shapes}
    rows[_label(shapes[4])] = _row(shapes[4], 0)
    return rows


def _label(shape: tuple[int, ...]) -> str:
    return "/".join(map(str, shape))


def _row(shape: tuple[int, ...], most_pairs: int, halves: bool = False) -> Row:
    product = Product(*shape[1:])
    return Row(shape[0], most_pairs, product, product, halves=halves)


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 3, 8, 24, 96, 512, 4096])
    parser.add_argument("--intermediate", type=int, default=INTERMEDIATE)
    parser.add_argument("--try", dest="tilings", action="store_true", help="time other tilings")
    parser.add_argument("--moe-library", type=Path, help=f"vLLM's {marlin.LIBRARY}")
    arguments = parser.parse_args()
    report = harness.Report(arguments)
    print(harness.roofs(), flush=True)
    layer = inputs.layer(arguments.intermediate)
    native = marlin.load(arguments.moe_library)
    if not native:
        print(f"no {marlin.LIBRARY}: no Marlin, and the routing is made in PyTorch", flush=True)
    theirs = marlin.Marlin(arguments.intermediate) if native else None
    for tokens in arguments.tokens:
        sets = [inputs.batch(tokens, 0)]
        touched = inputs.touched_bytes(sets[0], layer)
        sets += [inputs.batch(tokens, seed) for seed in range(1, int(SET_BYTES // touched) + 1)]
        expected = torch.empty_like(sets[0].out)
        run(sets[0], layer, expected, None, "reference", native)
        forms = ["bfloat16"] if tokens * TOP_K <= MOST_PAIRS else ["bfloat16", "float8"]
        for form in forms:
            bench(sets, layer, expected, form, theirs, arguments, report)


def bench(
    sets: list[Batch],
    layer: Layer,
    expected: torch.Tensor,
    form: str,
    theirs: marlin.Marlin | None,
    arguments: argparse.Namespace,
    report: harness.Report,
) -> None:
    """Our experts with activations of a form, beside Marlin's with bfloat16 ones.

    Args:
        expected: The definition's result for the first of ``sets``.
    """
    native = theirs is not None
    out = sets[0].out
    tokens = len(out)
    marlins = [functools.partial(theirs, each) for each in sets] if theirs is not None else []

    def error(call: harness.Call) -> float | None:
        if call in marlins:
            return None
        out.fill_(torch.nan)
        call()
        return relative_error(out, expected)

    def ours(_: str) -> tuple[str, dict[str, list]]:
        rows: dict[str, Row | None] = {"table": None}
        if arguments.tilings:
            rows |= tilings(tokens, form)
        return "table", {
            label: [
                functools.partial(run, each, layer, each.out, row, "triton", native, form)
                for each in sets
            ]
            for label, row in rows.items()
        }

    contest(
        report,
        dict(
            op="mxfp4_experts", tokens=tokens, intermediate=arguments.intermediate, activations=form
        ),
        native={"Marlin": marlins} if marlins else {},
        ours=ours,
        error=error,
        tolerance=TOLERANCES[form],
        work=dict(
            flops=inputs.flops(tokens, arguments.intermediate),
            nbytes=sum(inputs.touched_bytes(each, layer) for each in sets) / len(sets),
        ),
        lowerings=arguments.lowering,
        repeats=7,
    )


def run(
    batch: Batch,
    layer: Layer,
    out: torch.Tensor,
    row: Row | None,
    implementation: str,
    native: bool,
    activations: str = "bfloat16",
) -> None:
    options = {"align": marlin.align} if native else {}
    if implementation == "triton":
        options["activations"] = activations
    arguments = (
        batch.hidden_states,
        layer.w13,
        layer.w13_scale,
        layer.w2,
        layer.w2_scale,
        batch.topk_weights,
        batch.topk_ids,
        out,
    )
    if row is None:
        mxfp4_experts(*arguments, swiglu_limit=LIMIT, implementation=implementation, **options)
    else:
        float8 = options.pop("activations") == "float8"
        launch.mxfp4_experts(*arguments, LIMIT, row=row, float8=float8, **options)


if __name__ == "__main__":
    main()
