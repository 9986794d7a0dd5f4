"""Tilings of one kernel and the native kernel on the same inputs: checked, then timed in turn.

What every benchmark of a kernel does with its shapes. The rows have the same columns everywhere:

* ``op`` and the shape; ``lowering``, empty for the native kernel; ``candidate``: the tiling, or the
  native kernel's name; ``in_table``: whether it is what the engine would take;
* ``error``: relative, to the definition in float32 on the same inputs; none where a native kernel
  has weights of its own;
* ``us`` and what :func:`benchmarks.harness.rate` makes of it;
* ``to_native``: the native kernel's time over this one's. Above 1 is faster than native.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import triton

from benchmarks import harness

Call = harness.Call

# Kernels compile on the host, outside of Python's lock.
THREADS = 12


def contest(
    report: harness.Report,
    about: Mapping[str, object],
    *,
    native: Mapping[str, Sequence[Call]],
    ours: Callable[[str], tuple[str, Mapping[str, Sequence[Call]]]],
    error: Callable[[Call], float | None],
    tolerance: float,
    work: Mapping[str, float],
    lowerings: Sequence[str] | None = None,
    unit: int = 1,
    **options,
) -> None:
    """Check all candidates, time those that are right in each lowering, and report them.

    A candidate that raises or is wrong is printed, with the reason, and left out.

    Args:
        about: What each row begins with.
        native: Name -> calls, one for each input set. ``to_native`` is to the first; may be empty.
        ours: Of a lowering's name, which is set while it runs: the label of the candidate that the
            tables choose, and label -> calls of all candidates.
        error: Runs a first call, the one on the first input set, and returns its relative error, or
            None where there is nothing to compare with.
        tolerance: What the error must be below.
        work: Arguments of :func:`benchmarks.harness.rate` for one unit of work.
        lowerings: Names; both where it is ``None``.
        unit: Calls that make one unit of work.
        **options: Of :func:`benchmarks.harness.compare`.
    """
    # In order: what native kernels do to the process is not ours to know.
    native_errors = _right(native, error, tolerance, threads=1)
    for lowering in lowerings or harness.LOWERINGS:
        with harness.use_lowering(lowering):
            chosen, candidates = ours(lowering)
            errors = native_errors | _right(candidates, error, tolerance, threads=THREADS)
            calls = {**native, **candidates}
            timings = harness.compare({label: calls[label] for label in errors}, **options)
        native_us = next((timings[label].us for label in native if label in timings), None)
        if timings:
            report.rows(
                [
                    dict(
                        about,
                        lowering="" if label in native else lowering,
                        candidate=label,
                        in_table=label == chosen,
                        error=errors[label],
                        **harness.rate(timing.times(unit), **work),
                        to_native=native_us and round(native_us / timing.us, 3),
                    )
                    for label, timing in timings.items()
                ]
            )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean square of the error, over that of what was expected; NaN stays NaN."""
    expected = expected.float()
    error = (found.float() - expected).square().mean()
    return float(error.sqrt() / expected.square().mean().sqrt())


def _right(
    candidates: Mapping[str, Sequence[Call]],
    error: Callable[[Call], float | None],
    tolerance: float,
    threads: int,
) -> dict[str, float | None]:
    """Label -> error of those that run and are right."""

    def attempt(label: str) -> str | None:
        try:
            candidates[label][0]()
            torch.cuda.synchronize()
        except Exception as raised:  # a tiling that this GPU cannot run
            return f"{type(raised).__name__}: {raised}"[:300]
        return None

    triton.runtime.driver.active.get_current_device()  # made once, not by each thread
    with ThreadPoolExecutor(threads) as pool:
        failures = dict(zip(candidates, pool.map(attempt, candidates), strict=True))
    errors = {}
    for label, failure in failures.items():
        failure = failure and attempt(label)  # once more, alone
        if failure is None:
            found = error(candidates[label][0])
            if found is None or found < tolerance:
                errors[label] = found if found is None else round(found, 6)
                continue
            failure = f"WRONG: relative error {found}, allowed: {tolerance}"
        print(f"{label}: {failure}", flush=True)
    return errors
