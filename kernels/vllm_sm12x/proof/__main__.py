"""``python -m vllm_sm12x.proof``: compile every kernel for SM12x, without a GPU, and judge it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence

from vllm_sm12x import lowering
from vllm_sm12x.proof import discover, gate
from vllm_sm12x.proof.case import CompileCase
from vllm_sm12x.proof.gate import Report
from vllm_sm12x.proof.hardware import WARPS

_EPILOG = """
regs and stack (bytes) are a thread's, shared (bytes) a block's; blocks and warps are those that run
on one multiprocessor of SM12x at a time, limit is what allows no more. Exit status: 0 all pass,
1 a failure or nothing to compile, 2 wrong usage.
"""

Work = list[tuple[str, CompileCase, str]]


def main(argv: Sequence[str] | None = None, package: str = discover.OPERATIONS) -> int:
    """Run the command and return its exit status; ``package`` holds the operations."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_sm12x.proof",
        description=f"{__doc__.partition(': ')[2]} {lowering.ENV} sets the lowering.",
        epilog=_EPILOG,
    )
    parser.add_argument("--op", metavar="NAME", help="only this operation")
    parser.add_argument("--target", choices=gate.TARGETS, help="only this target")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    args = parser.parse_args(argv)

    cases = discover.cases(package)
    if args.op and args.op not in discover.operations(package):
        parser.error(f"--op: {args.op!r}, allowed: {', '.join(discover.operations(package))}")
    if args.op:
        cases = {name: given for name, given in cases.items() if name == args.op}
    gaps = [gap for gap in discover.gaps(package) if not args.op or gap.startswith(f"{args.op}: ")]
    targets = [args.target] if args.target else list(gate.TARGETS)
    work = [
        (name, case, target)
        for name, given in cases.items()
        for case in given
        for target in targets
    ]
    failures = (_json if args.json else _table)(work, gaps)
    return 1 if failures or gaps or not work else 0


def _reports(work: Work) -> Iterator[tuple[str, Report]]:
    """Operation and report of each case, in their order."""
    reports = gate.examine_all((case, target) for _, case, target in work)
    return zip((name for name, _, _ in work), reports, strict=True)


def _json(work: Work, gaps: list[str]) -> int:
    """Print everything as one object and return how many cases fail."""
    import triton

    results = [_as_dict(name, report) for name, report in _reports(work)]
    found = {
        "triton": triton.__version__,
        "lowering": lowering.setting(),
        "results": results,
        "gaps": gaps,
    }
    print(json.dumps(found, indent=2))
    return sum(bool(result["failures"]) for result in results)


def _as_dict(operation: str, report: Report) -> dict[str, object]:
    case, compiled = report.case, report.compiled
    entry: dict[str, object] = {
        "operation": operation,
        "case": case.label,
        "kernel": case.kernel_name,
        "configuration": case.config_text,
        "target": report.target,
        "options": lowering.launch_options(gate.TARGETS[report.target]),
        "failures": list(report.failures),
    }
    if compiled is not None:
        entry |= {
            "registers": compiled.registers,
            "stack_bytes": compiled.stack_bytes,
            "local_stores": compiled.local_stores,
            "local_loads": compiled.local_loads,
            "shared_bytes": compiled.shared_bytes,
            "blocks": compiled.occupancy.blocks,
            "warps": compiled.occupancy.warps,
            "limit": compiled.occupancy.limit,
            "matrix_instructions": compiled.matrix_instructions,
        }
    return entry


def _table(work: Work, gaps: list[str]) -> int:
    """Print a line a case as it is judged, then the failures, and return how many cases fail."""
    import triton

    def width(title: str, text: Callable[[tuple[str, CompileCase, str]], str]) -> int:
        return max([len(title), *(len(text(entry)) for entry in work)])

    operation = width("operation", lambda entry: entry[0])
    label = width("case", lambda entry: entry[1].label)
    line = (
        f"{{:{operation}}}  {{:{label}}}  {{:8}}  {{:>4}}  {{:>5}}  {{:>7}}  {{:>6}}  {{:>5}}"
        "  {:24}  {:7}  {}"
    )
    print(f"Triton {triton.__version__}, {lowering.ENV}={lowering.setting()}")
    titles = ("operation", "case", "target", "regs", "stack", "shared", "blocks", "warps")
    print(line.format(*titles, "limit", "verdict", "matrix instructions"))
    reports = []
    for name, report in _reports(work):
        reports.append(report)
        where = (name, report.case.label, report.target)
        print(line.format(*where, *_columns(report)).rstrip(), flush=True)
    failed = [report for report in reports if report.failures]
    for failure in (failure for report in failed for failure in report.failures):
        print(f"FAILED {failure}")
    for gap in gaps:
        print(f"FAILED {gap}")
    if not work:
        print("FAILED nothing to compile: no operation chosen has compile cases")
    print(f"{len(reports) - len(failed)} passed, {len(failed)} failed, {len(gaps)} without a case")
    return len(failed)


def _columns(report: Report) -> tuple[object, ...]:
    """A line's fields after operation, case and target."""
    verdict = "FAILED" if report.failures else "pass"
    compiled = report.compiled
    if compiled is None:
        return (*("-",) * 6, verdict, "does not compile")
    fits = compiled.occupancy
    return (
        compiled.registers,
        compiled.stack_bytes,
        compiled.shared_bytes,
        fits.blocks,
        f"{fits.warps}/{WARPS}",
        fits.limit,
        verdict,
        gate.matrix_text(compiled),
    )


if __name__ == "__main__":
    sys.exit(main())
