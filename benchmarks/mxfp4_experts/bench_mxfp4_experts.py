"""MXFP4 experts against vLLM's Marlin, from CUDA-graph replays.

Input sets take different experts, and are so many that the touched weights do not stay in the L2
cache. GB/s are over the weights and scales of the experts that a batch touches. ``reference_error``
is ``|ours - reference| / |reference|`` over the whole result of the first input set.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import triton

from benchmarks import harness
from benchmarks.mxfp4_experts import inputs, marlin
from benchmarks.mxfp4_experts.inputs import INTERMEDIATE, LIMIT, TOP_K, Batch, Layer
from vllm_sm12x.ops.mxfp4_experts import launch, mxfp4_experts
from vllm_sm12x.ops.mxfp4_experts.config import MOST_PAIRS, Product, Row

# Bytes of weights that the input sets touch together, at least; the L2 cache has 50 MB.
SET_BYTES = 600e6
THREADS = 12


def tilings(tokens: int) -> dict[str, Row]:
    """What ``--try`` times, both products alike."""
    if tokens * TOP_K <= MOST_PAIRS:
        shapes = [
            (16, 64, 256, 4, 4),
            (8, 64, 256, 4, 4),
            (16, 64, 128, 4, 4),
            (16, 64, 256, 4, 3),
            (16, 64, 256, 4, 6),
            (16, 128, 128, 4, 4),
            (16, 128, 256, 8, 3),
            (16, 128, 256, 4, 3),
            (16, 32, 256, 2, 4),
        ]
        rows = {_label(shape): _row(shape, MOST_PAIRS) for shape in shapes}
        for shape in shapes[:2]:
            for lines in (0, 2, 8):
                label = f"{_label(shape)} dependent {lines}"
                rows[label] = replace(_row(shape, MOST_PAIRS), dependent=True, lines=lines)
        return rows
    shapes = [
        (64, 128, 64, 4, 4),
        (64, 128, 64, 4, 3),
        (64, 256, 64, 8, 4),
        (64, 128, 128, 8, 3),
        (32, 128, 128, 4, 3),
        (32, 128, 64, 4, 4),
        (32, 256, 64, 8, 4),
        (128, 128, 64, 8, 3),
    ]
    rows = {_label(shape): _row(shape, 0) for shape in shapes}
    eight = [(64, 128, 128, 4, 3), (64, 128, 128, 4, 4), (64, 256, 128, 8, 3), (32, 128, 128, 4, 4)]
    return rows | {f"float8 {_label(shape)}": _row(shape, 0) for shape in eight}


def _label(shape: tuple[int, ...]) -> str:
    return "/".join(map(str, shape))


def _activations(label: str) -> str:
    return "float8" if label.startswith("float8") else "bfloat16"


def _row(shape: tuple[int, ...], most_pairs: int) -> Row:
    product = Product(*shape[1:])
    return Row(shape[0], most_pairs, product, product)


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 3, 8, 24, 96, 512, 4096])
    parser.add_argument("--intermediate", type=int, default=INTERMEDIATE)
    parser.add_argument("--try", dest="tilings", action="store_true", help="time other tilings")
    parser.add_argument("--moe-library", type=Path, help=f"vLLM's {marlin.LIBRARY}")
    arguments = parser.parse_args()
    report = harness.Report(arguments)
    triton.runtime.driver.active.get_current_device()  # once, before the threads that compile
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
        about = dict(op="mxfp4_experts", tokens=tokens, intermediate=arguments.intermediate)
        work = dict(
            flops=inputs.flops(tokens, arguments.intermediate),
            nbytes=sum(inputs.touched_bytes(each, layer) for each in sets) / len(sets),
        )
        candidates = {}
        if theirs is not None:
            candidates["marlin"] = [functools.partial(theirs, each) for each in sets]
        for lowering in arguments.lowering or harness.LOWERINGS:
            rows: dict[str, Row | None] = {"table": None, "float8 table": None}
            if arguments.tilings:
                rows = tilings(tokens)
            elif tokens * TOP_K <= MOST_PAIRS:
                del rows["float8 table"]
            with harness.use_lowering(lowering):
                calls = {
                    label: [
                        functools.partial(
                            run, each, layer, each.out, row, "triton", native, _activations(label)
                        )
                        for each in sets
                    ]
                    for label, row in rows.items()
                }
                compiled = _first_calls(calls, sets[0], expected)
                timings = harness.compare(
                    {**candidates, **{label: calls[label] for label in compiled}}, repeats=7
                )
            if candidates:
                theirs_us = timings["marlin"].us
                report.row(
                    **about,
                    lowering=lowering,
                    tiling="marlin",
                    error=None,
                    **harness.rate(timings["marlin"], **work),
                    ratio=1.0,
                )
            for label, error in compiled.items():
                ratio = round(timings[label].us / theirs_us, 3) if candidates else None
                figures = harness.rate(timings[label], **work)
                report.row(
                    **about, lowering=lowering, tiling=label, error=error, **figures, ratio=ratio
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


def _first_calls(calls: dict, batch: Batch, expected: torch.Tensor) -> dict[str, float]:
    """Compile side by side, then check each; those that run, with their error."""
    with ThreadPoolExecutor(THREADS, initializer=torch.cuda.set_device, initargs=(0,)) as pool:
        for of_label in calls.values():
            pool.submit(of_label[0])  # what it raises is raised again below
    errors = {}
    for label, of_label in calls.items():
        try:
            batch.out.fill_(torch.nan)
            of_label[0]()
            torch.cuda.synchronize()
            error = (batch.out.float() - expected.float()).norm() / expected.float().norm()
            errors[label] = round(error.item(), 5)
        except Exception as error:  # a tiling that this GPU cannot run
            print(f"{label}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return errors


if __name__ == "__main__":
    main()
