"""The plots of the page: by concurrency, by context, and the tokens of a run as they came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bokeh.embed import components as embed
from bokeh.models import ColumnDataSource, HoverTool, Model
from bokeh.palettes import Category10_10
from bokeh.plotting import figure
from bokeh.resources import Resources

from gates.report.tables import Variant, unasked
from gates.results import RowResult

# Three stand side by side in a window of 1,400 pixels.
WIDTH, HEIGHT = 435, 320
# Which figure is drawn against which part of the key, and how its axis is called.
AXES = {
    "concurrency": "requests at once",
    "prompt_tokens": "prompt tokens",
    "frontier": "prompt characters",
}
DRAWN = {
    "ttft_mean": "TTFT mean, s",
    "decode_mean": "decode per request, tok/s",
    "output_tok_s": "output in all, tok/s",
    "input_tok_s": "input in all, tok/s",
}
FAINT = "#b8c0cc"
# The plots themselves, without widgets, tables and WebGL: a page of one megabyte, not of four.
INLINE = Resources(mode="inline", components=["bokeh"])


def components(by_gate: dict[str, list[Variant]]) -> tuple[str, dict[str, list[str]], str]:
    """The page's script, the places of its plots by gate, and what makes them work offline."""
    drawn = {name: _plots(several) for name, several in by_gate.items()}
    flat = [plot for plots in drawn.values() for plot in plots]
    if not flat:
        return "", {}, ""
    script, places = embed(flat, wrap_script=True)
    rest = iter(places)
    return (
        script,
        {name: [next(rest) for _ in plots] for name, plots in drawn.items()},
        INLINE.render(),
    )


def _plots(several: Sequence[Variant]) -> list[Model]:
    return [*_by_key(several), *_timelines(several)]


def _by_key(several: Sequence[Variant]) -> list[Model]:
    """A figure against a part of the key that varies, a line for each value of the others."""
    plots: list[Model] = []
    skipped = unasked(several[0].result.gate)
    for axis, label in AXES.items():
        rows = [(v.label, row) for v in several for row in v.result.rows if axis in row.key]
        if len({row.key[axis] for _, row in rows}) < 2:
            continue
        for name, title in DRAWN.items():
            if name == skipped:
                continue
            points = [(variant, row) for variant, row in rows if name in row.figures]
            if len({row.key[axis] for _, row in points}) > 1:
                plots.append(_lines(points, axis, label, name, title))
    return plots


def _lines(
    points: Sequence[tuple[str, RowResult]], axis: str, label: str, name: str, title: str
) -> Model:
    plot = _figure(f"{title} by {label}", label, title)
    groups: dict[str, list[tuple[str, RowResult]]] = {}
    told = _telling(points, axis)
    for variant, row in points:
        parts = [variant] if variant else []
        parts += [f"{key} {row.key[key]}" for key in told if key in row.key]
        groups.setdefault(", ".join(parts) or title, []).append((variant, row))
    for number, (group, members) in enumerate(groups.items()):
        color = Category10_10[number % 10]
        members.sort(key=lambda member: member[1].key[axis])
        spread = [row.spread.get(name, {}) for _, row in members]
        values = [row.figures[name] for _, row in members]
        source = ColumnDataSource(
            {
                "x": [row.key[axis] for _, row in members],
                "y": values,
                "low": [one.get("min", y) for one, y in zip(spread, values, strict=True)],
                "high": [one.get("max", y) for one, y in zip(spread, values, strict=True)],
            }
        )
        plot.segment("x", "low", "x", "high", source=source, color=color, line_width=2, alpha=0.5)
        plot.line("x", "y", source=source, color=color, line_width=2, legend_label=group)
        dots = plot.scatter("x", "y", source=source, color=color, size=8, legend_label=group)
        plot.add_tools(
            HoverTool(
                renderers=[dots],
                tooltips=[
                    (label, "@x{0,0}"),
                    (title, "@y{0,0.000}"),
                    ("repeats, least to most", "@low{0,0.000} to @high{0,0.000}"),
                ],
            )
        )
    plot.y_range.start = 0
    if axis == "concurrency":
        # There is no request and a half. Lengths lie too close to each other to be all named.
        plot.xaxis.ticker = sorted({row.key[axis] for _, row in points})
    _legend(plot)
    return plot


def _legend(plot: Any) -> None:
    """Below the plot, where it hides no point; a click on a line's name hides the line."""
    if not plot.legend:
        return
    legend = plot.legend[0]
    legend.label_text_font_size = "11px"
    legend.click_policy = "hide"
    legend.ncols = 2
    plot.add_layout(legend, "below")


def _telling(points: Sequence[tuple[str, RowResult]], axis: str) -> list[str]:
    """The parts of the key, besides the axis, that tell rows apart."""
    keys = {key for _, row in points for key in row.key if key != axis}
    return sorted(key for key in keys if len({str(row.key.get(key)) for _, row in points}) > 1)


def _timelines(several: Sequence[Variant]) -> list[Model]:
    """The tokens so far of each request of a run, for gates whose requests have roles."""
    plots = []
    for variant in several:
        for row in variant.result.rows:
            answers = row.measured[0]["answers"]
            if any(entry["role"] for entry in answers):
                name = ", ".join(str(value) for value in row.key.values())
                plots.append(_timeline(answers, f"{name} {variant.label}".strip()))
    return plots


def _timeline(answers: Sequence[dict[str, Any]], name: str) -> Model:
    counted = all(c.tokens is not None for entry in answers for c in entry["answer"].chunks)
    # Without counts by chunk only the arrivals are known.
    what = "tokens" if counted else "chunks"
    plot = _figure(
        f"{what.capitalize()} as they came: {name} (first repeat)", "s", f"{what} so far"
    )
    # Not in the order in which they ended: a role has one colour in every plot.
    answers = sorted(answers, key=lambda entry: entry["role"])
    roles = list(dict.fromkeys(entry["role"] for entry in answers))
    start = min(entry["answer"].sent_at for entry in answers)
    for entry in answers:
        answer, role = entry["answer"], entry["role"]
        color = Category10_10[roles.index(role) % 10]
        at, so_far, total = [], [], 0
        for chunk in answer.chunks:
            total += chunk.tokens if counted else 1
            at.append(answer.sent_at - start + chunk.at)
            so_far.append(total)
        source = ColumnDataSource({"x": at, "y": so_far})
        plot.step(
            "x", "y", source=source, mode="after", color=color, line_width=2, legend_label=role
        )
        if at:
            # From sending to the first token: the wait.
            plot.segment(
                [answer.sent_at - start], [0], [at[0]], [0], color=color, line_dash="dotted"
            )
    plot.add_tools(HoverTool(tooltips=[("s", "@x{0.000}"), (what, "@y")]))
    _legend(plot)
    return plot


def _figure(title: str, x: str, y: str) -> Any:
    plot = figure(
        title=title,
        width=WIDTH,
        height=HEIGHT,
        x_axis_label=x,
        y_axis_label=y,
        tools="pan,wheel_zoom,box_zoom,reset,save",
    )
    plot.toolbar.logo = None
    plot.title.text_font_size = "11px"
    plot.outline_line_color = FAINT
    for axis in plot.axis:
        axis.formatter.use_scientific = False
    return plot
