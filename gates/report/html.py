"""The report as one HTML page with plots; it holds all that it needs and opens without network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gates.report import tables
from gates.report.markdown import variants
from gates.report.receipt import facts, notes
from gates.store import RunFolder

TEMPLATES = Path(__file__).with_name("templates")


def page(folders: Sequence[RunFolder]) -> str:
    """The page of one run, or of several variants."""
    from gates.report.plots import components

    by_gate = variants(folders)
    script, figures, resources = components(by_gate)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html").render(
        runs=[(facts(folder), notes(folder)) for folder in folders],
        gates=[
            {
                "gate": several[0].result.gate,
                "variants": several,
                "table": tables.main_table(several)
                if any(variant.result.rows for variant in several)
                else None,
                "lengths": [(v.label, told) for v in several if (told := tables.length_notes(v))],
                "unpublished": [told for v in several if (told := tables.unpublished(v))],
                "positions": [
                    (v.label, made) for v in several if (made := tables.positions_table(v))
                ],
                "spread": [(v.label, made) for v in several if (made := tables.spread_table(v))],
                "expected": [
                    (v.label, made) for v in several if (made := tables.expected_table(v))
                ],
                "figures": figures.get(name, []),
            }
            for name, several in by_gate.items()
        ],
        script=script,
        resources=resources,
    )
    # A page is kept in repositories, many of which refuse spaces at the end of a line; the plots'
    # script has some in its comments.
    return "\n".join(line.rstrip() for line in text.split("\n")) + "\n"


def written(folder: RunFolder) -> str:
    """The page of one run, saved in its folder as ``report.html``."""
    text = page([folder])
    folder.save("report.html", text)
    return text
