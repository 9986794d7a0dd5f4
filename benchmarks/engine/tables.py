"""Rows of several calls put side by side: each variant against native, with the aims beside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.engine import model, work
from benchmarks.engine.rows import Row
from stack.errors import StackError

BASE = "native"
# Portable over native, at most; and the first request after a start over the second.
AIMS = {"decode": 1.1, "ttft": 2.0, "cold start": 0.25, "first request": 1.2}
# Of the portable path, in seconds.
COLD_START_S = 90.0
MISSING = "–"
# Of how many operations the gain at the roof is said.
LARGEST = 3
# Measured on the machine: GB/s of a copy, TFLOP/s of a bf16 matrix product. FP8 has twice that.
MACHINES = {"H200": (4300.0, 790.0)}
IN_FP8 = ("mqa_logits", "paged_mqa_logits", "fp8_einsum", "fp8_linear", "mxfp4_experts")
# What rows of one table have in common.
ALIKE = ("layers", "tp", "mtp", "machine")
Key = tuple[Any, ...]


def reports(rows: Sequence[Row], commit: str | None = None) -> str:
    """A report of each model and machine in the rows, one after the other.

    Args:
        commit: Only rows of commits that begin so.

    Raises:
        StackError: No row is left.
    """
    kept = [row for row in rows if row["commit"].startswith(commit or "")]
    if not kept:
        known = ", ".join(sorted({row["commit"][:12] for row in rows})) or "none"
        raise StackError(
            f"no rows to report{f' of commit {commit!r}' if commit else ''}",
            f"measure first; --help says how; commits with rows: {known}",
        )
    groups: dict[Key, list[Row]] = {}
    for row in kept:
        model_of = tuple(row.get(name) for name in ALIKE)
        groups.setdefault(model_of, []).append(row)
    return "\n\n".join(map(report, groups.values()))


def report(rows: Sequence[Row]) -> str:
    """Every table that the rows allow, as Markdown. Of cells measured twice the last one counts.

    Raises:
        StackError: There are no rows, or they are of different models, drafts or machines.
    """
    if not rows:
        raise StackError("no rows to report", "measure first; --help says how")
    for name in ALIKE:
        values = {str(row.get(name)) for row in rows}
        if len(values) > 1:
            raise StackError(
                f"rows of different {name}: {', '.join(sorted(values))}",
                "report the files of one machine and model together",
            )
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    if BASE in variants:
        variants.insert(0, variants.pop(variants.index(BASE)))
    first = rows[0]
    parts = [
        f"{first['layers']} layers, TP={first['tp']}, MTP={first.get('mtp')}; {first['machine']}; "
        + ", ".join(sorted({row["date"] for row in rows}))
        + "; commit "
        + ", ".join(sorted({row["commit"][:12] for row in rows})),
        *_starts(rows, variants),
        _first_requests(rows, variants),
        _side_by_side(
            rows,
            variants,
            "Time to first token, ms",
            "ttft",
            ("prompt_tokens",),
            lambda row: _ms(row, "ttft_median"),
            AIMS["ttft"],
        ),
        _side_by_side(
            rows,
            variants,
            "Time per output token, ms",
            "decode",
            ("concurrency",),
            lambda row: _ms(row, "tpot_median"),
            AIMS["decode"],
        ),
        _side_by_side(
            rows,
            variants,
            "Time per step, ms (a step is one pass of the model; drafts make it several tokens)",
            "decode",
            ("concurrency",),
            _step_ms,
            AIMS["decode"],
        ),
        _random(rows, variants),
        *_profiles(rows, variants),
        _troubles(rows),
    ]
    return "\n\n".join(part for part in parts if part)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    marks = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *lines))


def number(value: float | None) -> str:
    """Three digits that count, or a dash."""
    if value is None:
        return MISSING
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def ratio(value: float | None, base: float | None, aim: float) -> str:
    """``value / base`` with a sign of whether the aim is met."""
    if value is None or not base:
        return MISSING
    found = value / base
    return f"{found:.2f}" + ("" if found <= aim else " (missed)")


def _last(rows: Sequence[Row], kind: str, *names: str) -> dict[Key, Row]:
    """The last good row of a kind by variant and what ``names`` say of it."""
    return {
        (row["variant"], *(row[name] for name in names)): row
        for row in rows
        if row["kind"] == kind and "fault" not in row
    }


def _ms(row: Row, name: str) -> float | None:
    return row[name] * 1e3 if name in row else None


def _step_ms(row: Row) -> float | None:
    if "tpot_median" not in row or "acceptance_length" not in row:
        return None
    return row["tpot_median"] * row["acceptance_length"] * 1e3


def _side_by_side(
    rows: Sequence[Row],
    variants: Sequence[str],
    title: str,
    kind: str,
    names: tuple[str, ...],
    value: Callable[[Row], float | None],
    aim: float,
) -> str:
    cells = _last(rows, kind, *names)
    keys = sorted({key[1:] for key in cells})
    if not keys:
        return ""
    others = [one for one in variants if one != BASE]
    head = [" ".join(names).replace("_", " "), *variants]
    head += [f"{one} / {BASE} (aim ≤ {aim:g})" for one in others if BASE in variants]
    lines = []
    for key in keys:
        found = {
            one: value(cells[(one, *key)]) if (one, *key) in cells else None for one in variants
        }
        line = [f"{key[0]:,}", *(number(found[one]) for one in variants)]
        if BASE in variants:
            line += [ratio(found[one], found[BASE], aim) for one in others]
        lines.append(line)
    return f"{title}\n\n{table(head, lines)}"


def _starts(rows: Sequence[Row], variants: Sequence[str]) -> list[str]:
    """Cold and warm starts against native's, and where each one's time goes."""
    cells = _last(rows, "start", "caches")
    parts = []
    for caches, title in (("empty", "Cold start, s"), ("used before", "Warm start, s")):
        here = {one: cells[(one, caches)] for one in variants if (one, caches) in cells}
        if not here:
            continue
        base = here.get(BASE, {}).get("ready_s")
        lines = [
            [
                one,
                number(row["ready_s"]) + _too_slow(one, caches, row["ready_s"]),
                ratio(row["ready_s"], base, AIMS["cold start"]) if one != BASE else MISSING,
                str(row["compiled"])
                + (f", {row['compiled_ahead']:.0f} beside" if row.get("compiled_ahead") else ""),
                number(row["compiling_s"]),
                ", ".join(
                    f"{name} {held['kernels']}"
                    for name, held in row.get("caches_hold", {}).items()
                    if held.get("kernels")
                )
                or MISSING,
            ]
            for one, row in here.items()
        ]
        aim = f" (aim ≤ {AIMS['cold start']:g})" if caches == "empty" else ""
        if caches != "empty":
            for line in lines:
                line[2] = line[2].replace(" (missed)", "")
        seconds = f" (aim ≤ {COLD_START_S:g})" if caches == "empty" else ""
        head = ["", f"until it answers{seconds}", f"/ {BASE}{aim}", "Triton compiled", "s of it"]
        parts.append(f"{title}\n\n{table([*head, 'kernels in caches'], lines)}")
        stages = list(
            dict.fromkeys(part["stage"] for row in here.values() for part in row["stages"])
        )
        lines = []
        for stage in stages:
            line = [stage]
            for row in here.values():
                part = next((one for one in row["stages"] if one["stage"] == stage), None)
                compiled = f" ({part['compiled']})" if part and part["compiled"] else ""
                line.append(number(part["s"] if part else None) + compiled)
            lines.append(line)
        parts.append(
            "Where it goes, s (kernels that Triton compiled)\n\n" + table(["stage", *here], lines)
        )
    return parts


def _too_slow(variant: str, caches: str, ready_s: float) -> str:
    missed = variant != BASE and caches == "empty" and ready_s > COLD_START_S
    return " (missed)" if missed else ""


def _first_requests(rows: Sequence[Row], variants: Sequence[str]) -> str:
    """The first request after each start against the second."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    caches: dict[str, str] = {}
    for row in rows:
        if row["kind"] == "start":
            caches[row["variant"]] = row["caches"]
        elif row["kind"] == "request" and "fault" not in row:
            place = (row["variant"], caches.get(row["variant"], MISSING))
            found.setdefault(place, {})[row["number"]] = row
    lines = []
    for (one, held), pair in sorted(found.items(), key=lambda item: variants.index(item[0][0])):
        first, second = (pair.get(number, {}).get("e2e_mean") for number in (1, 2))
        lines.append(
            [
                f"{one}, caches {held}",
                number(first),
                number(second),
                ratio(first, second, AIMS["first request"]),
                str(pair[1]["compiled"]) if 1 in pair else MISSING,
            ]
        )
    if not lines:
        return ""
    head = [
        "",
        "first",
        "second",
        f"ratio (aim ≤ {AIMS['first request']:g})",
        "compiled in the first",
    ]
    return f"First request after the start, s\n\n{table(head, lines)}"


def _random(rows: Sequence[Row], variants: Sequence[str]) -> str:
    """As the published table of random 8K/1K."""
    cells = _last(rows, "random", "concurrency")
    lines = []
    for one, concurrency in sorted(cells, key=lambda key: (variants.index(key[0]), key[1])):
        row = cells[(one, concurrency)]
        accepted = row.get("acceptance")
        lines.append(
            [
                one,
                str(concurrency),
                number(row.get("output_tok_s")),
                number(_ms(row, "ttft_mean")),
                number(_ms(row, "tpot_mean")),
                MISSING if accepted is None else f"{accepted:.1%}",
                number(row.get("acceptance_length")),
            ]
        )
    if not lines:
        return ""
    some = next(iter(cells.values()))
    head = ["", "C", "output tok/s", "TTFT mean, ms", "TPOT mean, ms", "acceptance", "length"]
    return (
        f"Random {some['prompt_tokens']:,}/{some['max_tokens']:,}, temperature "
        f"{some['temperature']:g}, {some['requests']} requests\n\n{table(head, lines)}"
    )


def _profiles(rows: Sequence[Row], variants: Sequence[str]) -> list[str]:
    """Where a step's time goes, by operation, and what the largest would gain at their roof."""
    parts = []
    cells = {
        (row["variant"], row["of"], row.get("concurrency", row.get("prompt_tokens"))): row
        for row in rows
        if row["kind"] == "profile"
    }
    for one, of, size in sorted(cells, key=lambda key: (key[1:], variants.index(key[0]))):
        row = cells[(one, of, size)]
        roofs = _roofs(row)
        lines = []
        for place, share in enumerate(row["shares"]):
            roof = roofs.get(share["operation"])
            gain = MISSING
            if roof is not None and place < LARGEST:
                gain = f"{max(0.0, share['us'] - roof) / row['busy_us']:.0%}"
            lines.append(
                [
                    share["operation"],
                    number(share["us"]),
                    f"{share['share']:.1%}",
                    number(share["launches"]),
                    number(roof),
                    gain,
                    ", ".join(share["kernels"][:2]),
                ]
            )
        what = (
            f"a decode step at concurrency {size}, {row['context']:,} tokens behind each"
            if of == "decode"
            else f"a chunk of a prompt of {size:,} tokens"
        )
        head = ["operation", "µs", "share", "launches", "at the roof, µs", "gain of the step"]
        parts.append(
            f"{one}: {what}. {row['steps']} steps; of each {number(row['span_us'])} µs a kernel "
            f"ran in {number(row['busy_us'])} µs.\n\n{table([*head, 'kernels'], lines)}"
        )
    return parts


def _roofs(row: Row) -> dict[str, float]:
    """Microseconds of each operation at the roof of the row's machine, where that is known."""
    known = next((rates for name, rates in MACHINES.items() if name in row["machine"]), None)
    if known is None:
        return {}
    config, mtp, tp = model.config(row["layers"]), row["mtp"], row["tp"]
    if row["of"] == "decode":
        needed = work.decode(config, row["concurrency"], row["context"], mtp, tp)
    else:
        # The mean chunk of the prompt.
        tokens = row["prompt_tokens"] // row["steps"]
        needed = work.prefill(config, tokens, (row["prompt_tokens"] - tokens) // 2, mtp, tp)
    copy_gbps, matmul_tflops = known
    return {
        name: one.us(copy_gbps, matmul_tflops * (2 if name in IN_FP8 else 1))
        for name, one in needed.items()
    }


def _troubles(rows: Sequence[Row]) -> str:
    """What failed, what was left out, and what was compiled while answers were timed."""
    said = []
    for row in rows:
        if row["kind"] in ("failed", "stopped"):
            before = f", before {row['before']}" if "before" in row else ""
            said.append(f"* {row['variant']}: {row['kind']}: {row['why']}{before}")
        elif row["kind"] in ("ttft", "decode", "random") and row.get("compiled"):
            kernels = ", ".join(row["compiled_kernels"][:5])
            said.append(
                f"* {row['variant']}: {row['compiled']} kernels compiled within {row['kind']}: "
                + kernels
            )
    return "\n".join(said)
