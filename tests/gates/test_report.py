"""The report: the published tables column by column, a page that needs no network, a comparison."""

from __future__ import annotations

import json
import os
import shlex
from html.parser import HTMLParser

import pytest

from gates import redaction
from gates.answer import Answer, Chunk
from gates.report import comparison, html, markdown, plots, receipt
from gates.report.format import shown, spread, table
from gates.report.tables import Variant
from gates.results import GateResult, RowResult, results
from gates.spec import load_gates, load_profiles
from gates.store import RunFolder, now
from gates.workloads import WORKLOADS
from stack.git import git

# The headings of the tables in pull request 41834, in their order; the suite may add columns
# between and after them. "Variant" is a column of its own in every table of a labelled run.
PUBLISHED = {
    "gsm8k": ["exact_match_flexible", "exact_match_strict"],
    "mt-bench": [
        "C",
        "Output tok/s",
        "TTFT mean",
        "TPOT mean",
        "MTP acceptance",
        "Acceptance length",
    ],
    "random-8k-1k": [
        "C",
        "Output tok/s",
        "TTFT mean",
        "TPOT mean",
        "MTP acceptance",
        "Acceptance length",
    ],
    "long-context-latency": [
        "Prompt tokens",
        "C",
        "TTFT mean",
        "TTFT max",
        "Decode mean tok/s",
        "Fairness min/max",
        "ITL p99",
        "Failures",
    ],
    "frontier-sweep": [
        "Prompt",
        "Target frontier",
        "Prompt tokens",
        "TTFT",
        "Input tok/s",
        "Decode tok/s",
        "ITL p99",
    ],
    "prefill-sweep": ["Input tokens", "Input tok/s", "TTFT mean"],
    "mixed-arrival": ["Primary TTFT mean", "Secondary TTFT mean", "Secondary ITL p99"],
    "streaming-pressure": ["Requests", "Failures", "Max prompt tokens", "TTFT max", "ITL p95"],
    "acceptance": ["C", "Successful requests", "Output tok/s", "TTFT mean", "MTP acceptance"],
    "tool-calls": ["Score", "Failed cases (0 points)"],
    "long-context-decode": ["C", "Decode mean tok/s", "Decode min tok/s", "Decode max tok/s"],
    "story-recall": ["Prompt tokens", "Matched of 16", "TTFT", "Decode tok/s", "ITL p99"],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_columns_are_there_in_their_order(name):
    heads = iter(column.head for column in load_gates()[name].columns)
    assert all(wanted in heads for wanted in PUBLISHED[name])


def test_throughput_never_stands_without_its_temperature():
    for name in ("random-8k-1k", "random-256-256", "prefill-sweep", "mt-bench", "acceptance"):
        assert "temperature" in {column.figure for column in load_gates()[name].columns}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12.16, "s", "12.160 s"),
        (0.022, "ms", "22.00 ms"),
        (137.054, "tok/s", "137.05"),
        (0.2371, "ratio", "0.237"),
        (0.6769, "percent", "67.69%"),
        (58980, "int", "58,980"),
        (None, "s", "-"),
        ("", "text", "-"),
        (True, "text", "yes"),
        ([0.9, 0.6], "percent", "90.00% / 60.00%"),
    ],
)
def test_figures_are_written_as_the_published_ones(value, unit, text):
    assert shown(value, unit) == text


def test_a_spread_and_a_table():
    values = {"median": 2.0, "min": 1.5, "max": 3.0, "n": 5}
    assert spread(values, "s") == "2.000 s (1.500 s to 3.000 s)"
    assert spread(values | {"n": 1}, "s") == "2.000 s"
    text = table(["a", "b"], [["x|y", "1\n2"]], [False, True])
    assert text.splitlines() == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 2 |"]
    # What looks like a tag would be none of the text: vLLM's reasoning parser has such ones.
    text = table(["a"], [["<think>"]], [False])
    assert text.splitlines()[2] == "| \\<think> |"


def made(path, gates, ttfts, size="full", variant="", by_chunk=True):
    """A run's folder with a request a repeat, its first token after so many seconds."""
    profile = load_profiles()["2x-rtx-pro-6000"]
    chosen = [load_gates()[name] for name in gates]
    folder = RunFolder.create(
        path,
        {
            "seed": "x",
            "started": now(),
            "size": size,
            "variant": variant,
            "profile": profile.model_dump(),
            "server": {
                "model": "<script>alert(1)</script>",
                "version": None,
                "max_model_len": None,
                "prefix_cache": None,
                "speculation": None,
            },
            "machine": {"gpus": [], "packages": {}},
            "gates": [gate.model_dump() for gate in chosen],
            "order": {},
        },
    )
    for gate in chosen:
        key = {"prompt_tokens": 58980, "concurrency": 1}
        if gate.workload == "arrival":
            key = {"case": "decode_then_59k"}
        folder.write("phase", gate=gate.name, state="started", why="")
        for repeat, ttft in enumerate(ttfts, 1):
            cell = f"{gate.name} {repeat}"
            for role in ("primary", "secondary"):
                answer = Answer(
                    sent_at=100.0 if role == "primary" else 100.7,
                    chunks=[
                        Chunk(ttft, 1 if by_chunk else None),
                        Chunk(ttft + 1.0, 100 if by_chunk else None),
                    ],
                    ended=ttft + 1.0,
                    prompt_tokens=58980,
                    completion_tokens=101,
                )
                folder.write(
                    "request",
                    gate=gate.name,
                    cell=cell,
                    attempt=1,
                    wave=0,
                    role=role if gate.workload == "arrival" else "",
                    note={"found": 3, "hidden": 3},
                    answer=answer.record(),
                )
            folder.write(
                "cell",
                gate=gate.name,
                cell=cell,
                key=key,
                repeat=repeat,
                attempt=1,
                requests=2,
                status="measured",
                error="",
                figures={"slow_stall_s": 10.0} if gate.workload == "arrival" else {},
            )
        folder.write("phase", gate=gate.name, state="ended", why="")
    folder.close()
    return RunFolder.read(path)


def test_a_row_is_written_with_its_figures_and_what_was_expected(tmp_path):
    text = markdown.report([made(tmp_path / "a", ["long-context-latency"], [12.0, 13.0, 11.0])])
    row = next(line for line in text.splitlines() if line.startswith("| 58,980 | 1 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    heads = [column.head for column in load_gates()["long-context-latency"].columns]
    told = dict(zip(heads, cells, strict=True))
    assert told["TTFT mean"] == "12.000 s" and told["TTFT max"] == "13.000 s"
    assert told["Decode mean tok/s"] == "100.00" and told["Fairness min/max"] == "1.000"
    assert told["Requests"] == "6" and told["Recalled"] == "100.00%"
    assert "12.000 s (11.000 s to 13.000 s)" in text
    # 12.160 s was published for this row.
    assert "| ttft_mean | 12.000 s | 12.160 s | 0.987 |" in text


def test_the_short_size_is_held_against_nothing(tmp_path):
    text = markdown.report([made(tmp_path / "a", ["long-context-latency"], [1.0], size="short")])
    assert "Against what was measured before" not in text


def test_the_serve_command_can_be_pasted(tmp_path):
    folder = made(tmp_path / "a", ["long-context-latency"], [1.0])
    command = ["vllm", "serve", "a model", "--speculative-config", '{"method":"mtp"}']
    folder.about["serve"] = command
    told = dict(receipt.facts(folder))["Serve command"]
    assert shlex.split(told) == command


def test_the_settings_that_a_started_server_takes_over_are_told(tmp_path, monkeypatch):
    for name in redaction.settings(os.environ):
        monkeypatch.delenv(name)
    folder = made(tmp_path / "a", ["long-context-latency"], [1.0])

    def told():
        return dict(receipt.facts(folder))["Settings of the environment"]

    assert told() == "not recorded"
    folder.about["machine"] = receipt.machine()
    assert told().startswith("none of SM12X_*, NCCL_*, VLLM_*")
    monkeypatch.setenv("SM12X_PORTABLE", "all")
    monkeypatch.setenv("SM12X_KERNELS", "none")
    folder.about["machine"] = receipt.machine()
    assert told() == "SM12X_KERNELS=none SM12X_PORTABLE=all"
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setenv("VLLM_API_KEY", "hush")
    folder.about["machine"] = receipt.machine()
    assert told() == "NCCL_P2P_DISABLE=1 SM12X_KERNELS=none SM12X_PORTABLE=all"


def test_a_secret_that_an_older_run_kept_is_not_shown(tmp_path):
    folder = made(tmp_path / "a", ["long-context-latency"], [1.0])
    other = made(tmp_path / "b", ["long-context-latency"], [1.0])
    folder.about["serve"] = ["vllm", "serve", "--api-key", "hush"]
    texts = [
        markdown.report([folder]),
        html.page([folder]),
        json.dumps(receipt.receipt(folder)),
        comparison.comparison(folder, other),
    ]
    assert [text.count("hush") for text in texts] == [0, 0, 0, 0]
    assert [text.count("--api-key") >= 1 for text in texts] == [True] * 4


def test_what_is_not_known_of_the_serving_python_says_how_it_could_be(tmp_path):
    folder = made(tmp_path / "a", ["long-context-latency"], [1.0])
    told = dict(receipt.facts(folder))
    assert "--python" in told["NCCL"] and "--python" in told["Packages that served"]
    folder.about["machine"]["serving"] = {"packages": {"torch": "2.0"}, "error": "no GPU"}
    told = dict(receipt.facts(folder))
    assert (told["NCCL"], told["Packages that served"]) == ("none seen", "torch 2.0")


def test_changes_are_those_of_the_suite(tmp_path, monkeypatch):
    """A run's folder in the checkout makes no other suite; a gate file that differs does."""
    monkeypatch.setattr(receipt, "ROOT", tmp_path)
    assert receipt._commit() == ""
    git("init", "-q", cwd=tmp_path)
    for folder in receipt.SUITE:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_text("one")
    git("add", ".", cwd=tmp_path)
    git("commit", "-q", "-m", "x", cwd=tmp_path)
    commit = git("rev-parse", "HEAD", cwd=tmp_path).text
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "rows.jsonl").write_text("{}")
    assert receipt._commit() == commit
    (tmp_path / "gates" / "a").write_text("two")
    assert receipt._commit() == f"{commit}+changes"


def test_a_gate_of_reading_shows_the_rate_of_the_input(tmp_path):
    """One token of answer: its output says nothing of the speed of reading."""
    text = markdown.report([made(tmp_path / "a", ["prefill-sweep"], [1.0, 2.0])])
    heads = next(line for line in text.splitlines() if "| Repeats |" in line)
    assert "Input tok/s: median" in heads and "Output tok/s" not in heads
    text = markdown.report([made(tmp_path / "b", ["random-256-256"], [1.0, 2.0])])
    heads = next(line for line in text.splitlines() if "| Repeats |" in line)
    assert "Output tok/s: median" in heads and "Input tok/s" not in heads


def _row(concurrency, tokens):
    key = {"concurrency": concurrency, "prompt_tokens": tokens}
    figures = {"ttft_mean": 1.0, "input_tok_s": 2.0, "output_tok_s": 3.0}
    return RowResult(key, figures, {}, [{"answers": []}])


@pytest.mark.parametrize(
    ("name", "rate"),
    [("prefill-sweep", "input in all, tok/s"), ("random-8k-1k", "output in all, tok/s")],
)
def test_a_plot_names_the_concurrencies_that_were_measured(name, rate):
    rows = [_row(1, 256), _row(3, 1024)]
    result = GateResult(load_gates()[name], "passed", rows)
    drawn = plots._plots([Variant("", "h200", "full", result)])
    by_title = {plot.title.text: plot for plot in drawn}
    assert by_title.keys() == {
        f"{title} by {axis}"
        for title in ("TTFT mean, s", rate)
        for axis in ("requests at once", "prompt tokens")
    }
    assert by_title[f"{rate} by requests at once"].xaxis.ticker.ticks == [1, 3]


def test_a_role_has_one_colour_whichever_ended_first(tmp_path):
    folder = made(tmp_path / "a", ["mixed-arrival"], [1.0])
    (result,) = results(folder)
    answers = result.rows[0].measured[0]["answers"]
    told = []
    for order in (answers, answers[::-1]):
        legend = plots._timeline(order, "x").legend[0]
        told.append(
            [(item.label.value, item.renderers[0].glyph.line_color) for item in legend.items]
        )
    assert told[0] == told[1] and [role for role, _ in told[0]] == ["primary", "secondary"]


class Page(HTMLParser):
    """What a page would fetch, and its headings."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.sections, self.scripts = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.scripts += tag == "script"
        self.fetched += [
            value
            for name, value in given.items()
            if name in ("src", "href", "data", "poster") and not str(value).startswith("#")
        ]
        if tag == "h2":
            self.sections.append(given.get("id"))


def test_the_page_fetches_nothing_and_is_not_large(tmp_path):
    folder = made(tmp_path / "a", ["long-context-latency", "mixed-arrival"], [1.0, 2.0])
    text = html.page([folder])
    page = Page(text)
    assert page.fetched == []
    assert {"long-context-latency", "mixed-arrival"} <= set(page.sections)
    assert "@import" not in text.partition("<body>")[0].partition("<script")[0]
    assert len(text) < 2 << 20, "a page of a run must fit into the repository"
    # As tests/repo wants every text.
    assert text.endswith("</html>\n") and all(line == line.rstrip() for line in text.split("\n"))
    # A name from a server is text and no markup.
    assert "<script>alert(1)</script>" not in text and "&lt;script&gt;alert(1)" in text


def test_the_page_has_the_token_timeline_of_each_mixed_case(tmp_path):
    text = html.page([made(tmp_path / "a", ["mixed-arrival"], [1.0, 2.0])])
    assert "Tokens as they came: decode_then_59k (first repeat)" in text
    assert "data-root-id" in text
    text = html.page([made(tmp_path / "b", ["mixed-arrival"], [1.0, 2.0], by_chunk=False)])
    assert "Chunks as they came: decode_then_59k (first repeat)" in text


def test_a_run_without_rows_has_a_page(tmp_path):
    folder = made(tmp_path / "a", ["long-context-latency"], [])
    assert "not run" in html.page([folder]) and "not run" in markdown.report([folder])


def compared(tmp_path, before, after):
    first = made(tmp_path / "a", ["long-context-latency"], before)
    second = made(tmp_path / "b", ["long-context-latency"], after, variant="new")
    found = list(comparison.differences(first, second))
    return next(one for one in found if one.figure == "ttft_mean"), first, second


@pytest.mark.parametrize(
    ("before", "after", "judgement"),
    [
        ([10.0, 11.0, 12.0, 13.0], [5.0, 6.0, 7.0, 8.0], "better"),
        ([5.0, 6.0, 7.0, 8.0], [10.0, 11.0, 12.0, 13.0], "worse"),
        ([10.0, 11.0, 12.0, 13.0], [12.5, 14.0, 15.0, 16.0], "within the spread"),
        ([10.0, 11.0, 12.0], [1.0, 1.1, 1.2], "fewer than 4 repeats"),
    ],
)
def test_a_difference_is_said_beyond_the_spread_alone(tmp_path, before, after, judgement):
    one, _, _ = compared(tmp_path, before, after)
    assert one.judgement == judgement


def test_the_comparison_says_ratio_settings_and_what_is_missing(tmp_path):
    one, first, second = compared(tmp_path, [10.0] * 4, [5.0] * 4)
    assert one.ratio == pytest.approx(0.5)
    text = comparison.comparison(first, second)
    assert "| variant |  | new |" in text
    assert (
        "| 10.000 s (10.000 s to 10.000 s) | 5.000 s (5.000 s to 5.000 s) | 0.500 | better |"
        in text
    )
    third = made(tmp_path / "c", ["long-context-latency", "mixed-arrival"], [10.0])
    assert "only in the second: Mixed arrival" in comparison.comparison(first, third)


def test_more_is_better_for_rates(tmp_path):
    high = {"median": 2.0, "min": 2.0, "max": 2.0, "n": 5}
    low = {"median": 1.0, "min": 1.0, "max": 1.0, "n": 5}

    def judged(figure):
        return comparison.Difference("g", "r", figure, "s", low, high).judgement

    assert judged("decode_mean") == judged("primary_decode_mean") == "better"
    assert judged("itl_p99") == judged("secondary_ttft_mean") == "worse"
    assert judged("score") == judged("same_first") == judged("exact_match_strict") == "better"
    assert judged("hit_share") == judged("acceptance_length") == "better"
    assert judged("failed_cases") == judged("errors") == judged("log_nan") == "worse"
    assert judged("requests") == "differs"


# Neither much nor little of them is good.
NEITHER = {
    *("bias", "stderr", "tokens_per_chunk", "graphs_full", "graphs_piecewise", "answered_before"),
    *("requests", "finished", "written", "reasoned", "overlapped", "positions", "cases"),
    *("questions", "shots", "prompt_tokens_mean", "prompt_tokens_max"),
}


@pytest.mark.parametrize("name", load_gates())
def test_every_figure_of_a_gate_has_a_direction_or_none_on_purpose(name):
    gate = load_gates()[name]
    keys = WORKLOADS[gate.workload].KEYS
    high = {"median": 2.0, "min": 2.0, "max": 2.0, "n": 5}
    low = {"median": 1.0, "min": 1.0, "max": 1.0, "n": 5}
    undecided = {
        column.figure
        for column in gate.columns
        if column.unit != "text"
        and column.figure not in keys
        and comparison.Difference("g", "r", column.figure, "s", low, high).judgement == "differs"
    }
    assert undecided <= NEITHER


def told(folder, title):
    """The lines of a list or a table beneath a title of the Markdown report."""
    after = markdown.report([folder]).split(f"{title}:\n\n")
    return after[1].split("\n\n")[0].split("\n") if len(after) > 1 else []


def noted(folder, prompt_tokens=58980, **note):
    for line in folder.of("request"):
        line["note"] |= note
        line["answer"]["prompt_tokens"] = prompt_tokens
    return folder


def test_prompts_that_nothing_counted_are_said_beneath_the_table(tmp_path):
    folder = made(tmp_path / "a", ["long-context-latency"], [1.0, 2.0])
    noted(folder, None, counted_tokens=None, wanted_tokens=58980)
    (line,) = told(folder, "Prompt lengths")
    assert "Nothing counted the tokens of 4 of 4 prompts" in line
    assert "Nothing counted the tokens of 4 of 4 prompts" in html.page([folder])


@pytest.mark.parametrize(("got", "off"), [(58980, 0), (59097, 0), (59099, 2), (58800, 2)])
def test_prompts_of_another_length_are_said_beneath_the_table(tmp_path, got, off):
    """58,980 may be off by 0.2 %, which are 118."""
    folder = made(tmp_path / "a", ["long-context-latency"], [1.0])
    noted(folder, got, counted_tokens=None, wanted_tokens=58980)
    lines = told(folder, "Prompt lengths")
    wanted = f"{off} of 2 prompts of 58,980 tokens had {got:,}, off"
    assert [wanted in line for line in lines] == [True] * bool(off)
    assert (wanted in html.page([folder])) is bool(off)


def test_acceptance_is_shown_by_position(tmp_path):
    folder = made(tmp_path / "a", ["long-context-latency"], [1.0, 2.0])
    assert told(folder, "Acceptance by position of the draft") == []
    for cell, shares in zip(folder.of("cell"), ([0.84, 0.5], [0.86, 0.6]), strict=True):
        cell["figures"] = {"acceptance_by_position": shares}
    lines = told(folder, "Acceptance by position of the draft")
    assert "| Position 0 | Position 1 |" in lines[0]
    assert lines[2].endswith("| 85.00% | 55.00% |")
    assert "85.00%" in html.page([folder])


def test_where_nobody_published_a_figure_the_report_says_so(tmp_path):
    folder = made(tmp_path / "a", ["long-context-latency"], [1.0], variant="MTP=2")
    said = "No published figure for the profile"
    assert said not in markdown.report([folder]) + html.page([folder])
    folder.about["profile"]["name"] = "1x-gb10"
    wanted = f"{said} 1x-gb10 and the variant MTP=2."
    assert wanted in markdown.report([folder]) and wanted in html.page([folder])
    folder.about["size"] = "short"
    assert said not in markdown.report([folder]) + html.page([folder])


def test_a_record_of_rows_is_json_throughout(tmp_path):
    folder = made(tmp_path / "a", ["mixed-arrival"], [1.0])
    for line in (folder.path / "rows.jsonl").read_text().splitlines():
        assert {"kind", "at"} <= json.loads(line).keys()
