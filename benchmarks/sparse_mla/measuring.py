"""A row of the attention benchmarks: ours and FlashMLA's in turn, and how far they are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks import harness

Calls = Sequence[Callable[[], object]]


def measure(
    report: harness.Report,
    figures: dict[str, object],
    calls: Calls,
    native: Mapping[str, Calls],
    out: torch.Tensor,
    work: Mapping[str, float],
    relation: Callable[[float, float], dict[str, float]],
) -> None:
    """Time ``calls`` and report them; a tiling that this GPU cannot run prints why.

    Args:
        figures: What the row begins with.
        native: ``{"flashmla": calls}`` on the same input sets, or nothing.
        out: What the first of ``calls`` writes.
        work: Arguments of :func:`benchmarks.harness.rate`.
        relation: Of the microseconds of ours and FlashMLA's, the figure that compares them.
    """
    figures = dict(figures)
    try:
        out.fill_(float("nan"))
        calls[0]()
        if native:
            expected = native["flashmla"][0]().float()
            error = (out.float() - expected).norm() / expected.norm()
            figures["relative_error"] = round(error.item(), 5)
        timings = harness.compare({"ours": calls, **native})
    except Exception as error:  # a tiling that this GPU cannot run
        print(f"{figures}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return
    figures |= harness.rate(timings["ours"], **work)
    if native:
        figures["flashmla_us"] = round(timings["flashmla"].us, 2)
        figures |= relation(timings["ours"].us, timings["flashmla"].us)
    report.row(**figures)
