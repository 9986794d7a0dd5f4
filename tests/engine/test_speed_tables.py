"""The tables of the engine's speed, from rows that are written here by hand."""

import json

import pytest

from benchmarks.engine import __main__, rows, tables
from stack.errors import StackError

ABOUT = {
    "layers": 5,
    "tp": 1,
    "mtp": 2,
    "date": "2026-11-24",
    "commit": "0123456789abcdef",
    "machine": "1 x NVIDIA H200",
    "command": "python -m benchmarks.engine",
}
PORTABLE = "portable, sm120"


def row(kind, variant="native", **figures):
    return {"kind": kind, "variant": variant, **ABOUT, **figures}


def start(variant, ready_s, caches="empty"):
    stages = [{"stage": "weights", "s": ready_s, "compiled": 2, "compiling_s": 1.5}]
    held = {"triton": {"files": 8, "bytes": 9, "kernels": 4}, "vllm": {"files": 1, "bytes": 1}}
    return row(
        "start",
        variant,
        caches=caches,
        ready_s=ready_s,
        stages=stages,
        compiled=2,
        compiling_s=1.5,
        caches_hold=held,
    )


def request(number, e2e, variant="native", compiled=0):
    return row("request", variant, number=number, e2e_mean=e2e, compiled=compiled)


def lines(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_decode_is_set_against_native_and_the_aim():
    found = tables.report(
        [
            row("decode", concurrency=1, tpot_median=0.010, acceptance_length=1.0),
            row("decode", PORTABLE, concurrency=1, tpot_median=0.0105, acceptance_length=2.0),
            row("decode", concurrency=8, tpot_median=0.020, acceptance_length=1.0),
            row("decode", PORTABLE, concurrency=8, tpot_median=0.025, acceptance_length=1.0),
        ]
    )
    assert "| 1 | 10 | 10.5 | 1.05 |" in lines(found)
    assert "| 8 | 20 | 25 | 1.25 (missed) |" in lines(found)
    assert "(aim ≤ 1.1)" in found
    # A step: the time of a token times the tokens of a step.
    assert "| 1 | 10 | 21 | 2.10 (missed) |" in lines(found)


def test_prompts_are_in_order_and_a_hole_is_a_dash():
    found = tables.report(
        [
            row("ttft", PORTABLE, prompt_tokens=124_000, ttft_median=3.0),
            row("ttft", PORTABLE, prompt_tokens=1024, ttft_median=0.030),
            row("ttft", prompt_tokens=1024, ttft_median=0.0151),
        ]
    )
    assert lines(found)[2:] == [
        "| 1,024 | 15.1 | 30 | 1.99 |",
        "| 124,000 | – | 3,000 | – |",
    ]


def test_the_last_of_two_counts_and_a_failed_one_does_not():
    found = tables.report(
        [
            row("ttft", prompt_tokens=1024, ttft_median=9.0),
            row("ttft", prompt_tokens=1024, ttft_median=0.02),
            row("ttft", prompt_tokens=1024, ttft_median=7.0, fault="total: given up"),
        ]
    )
    assert lines(found)[2:] == ["| 1,024 | 20 |"]


def test_a_cold_start_has_its_aim_and_its_stages():
    found = tables.report([start("native", 400.0), start(PORTABLE, 90.0)])
    assert "| portable, sm120 | 90 | 0.23 | 2 | 1.5 | triton 4 |" in lines(found)
    assert "| weights | 400 (2) | 90 (2) |" in lines(found)
    slow = tables.report([start("native", 300.0), start(PORTABLE, 90.5)])
    assert "| portable, sm120 | 90.5 (missed) | 0.30 (missed) | 2 | 1.5 | triton 4 |" in lines(slow)
    assert "| native | 300 | – |" in slow


def test_a_warm_start_is_a_table_of_its_own_without_an_aim():
    found = tables.report(
        [start("native", 40.0, "used before"), start(PORTABLE, 38.0, "used before")]
    )
    assert "Warm start, s" in found and "Cold start" not in found
    assert "| portable, sm120 | 38 | 0.95 | 2 | 1.5 | triton 4 |" in lines(found)


def test_first_requests_belong_to_their_start():
    found = tables.report(
        [
            start("native", 400.0),
            request(1, 17.3, compiled=40),
            request(2, 0.1),
            start("native", 40.0, "used before"),
            request(1, 0.11),
            request(2, 0.1),
        ]
    )
    assert "| native, caches empty | 17.3 | 0.1 | 173.00 (missed) | 40 |" in lines(found)
    assert "| native, caches used before | 0.11 | 0.1 | 1.10 | 0 |" in lines(found)


def test_random_states_the_temperature_and_the_acceptance():
    found = tables.report(
        [
            row(
                "random",
                concurrency=2,
                prompt_tokens=8192,
                max_tokens=1024,
                temperature=0.0,
                requests=16,
                output_tok_s=220.51,
                ttft_mean=1.57453,
                tpot_mean=0.00739,
                acceptance=0.8633,
                acceptance_length=2.73,
            )
        ]
    )
    assert "Random 8,192/1,024, temperature 0, 16 requests" in found
    assert "| native | 2 | 221 | 1,575 | 7.39 | 86.3% | 2.73 |" in lines(found)


def test_what_was_left_out_or_compiled_meanwhile_is_said():
    found = tables.report(
        [
            row("ttft", prompt_tokens=1024, ttft_median=1.0, compiled=2, compiled_kernels=["a"]),
            row("stopped", PORTABLE, why="the budget of 60 s is spent", before="ttft 8192"),
        ]
    )
    assert "* native: 2 kernels compiled within ttft: a" in found
    assert "* portable, sm120: stopped: the budget of 60 s is spent, before ttft 8192" in found


@pytest.mark.parametrize("name", ["layers", "tp", "mtp", "machine"])
def test_rows_that_cannot_be_compared_are_refused(name):
    with pytest.raises(StackError, match=name):
        tables.report([row("ttft"), row("ttft") | {name: "another"}])


def test_each_model_has_a_report_of_its_own():
    whole = row("ttft", prompt_tokens=1024, ttft_median=0.5) | {"layers": 43, "tp": 2}
    few = row("ttft", prompt_tokens=1024, ttft_median=0.25)
    found = tables.reports([few, whole])
    first, second = found.split("43 layers, TP=2")
    assert first.startswith("5 layers, TP=1") and "| 1,024 | 250 |" in first
    assert "| 1,024 | 500 |" in second


def test_a_commit_is_reported_alone():
    later = row("ttft", prompt_tokens=1024, ttft_median=0.5) | {"commit": "fedc"}
    both = [row("ttft", prompt_tokens=1024, ttft_median=0.25), later]
    assert "| 1,024 | 250 |" in tables.reports(both, "0123")
    assert "| 1,024 | 500 |" in tables.reports(both, "fedc")
    with pytest.raises(StackError, match="of commit 'abc'") as error:
        tables.reports(both, "abc")
    assert "0123456789ab, fedc" in error.value.hint


def test_a_start_by_fork_is_a_variant_of_its_own(monkeypatch):
    args = __main__.checked(["--path", "portable", "--lowering", "sm120", "--caches", "x"])
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    assert __main__.variant(args) == "portable, sm120"
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    assert __main__.variant(args) == "portable, sm120, fork"
    found = rows.about(["--start-only"], "abc")["command"]
    assert found.startswith("VLLM_WORKER_MULTIPROC_METHOD=fork python -m ")


def test_nothing_to_report_is_said():
    with pytest.raises(StackError, match="no rows"):
        tables.report([])


def test_rows_are_on_disk_the_moment_they_are_added(tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    kept = rows.Rows({"variant": "native", **ABOUT}, out)
    kept.add("ttft", prompt_tokens=1024, ttft_median=0.25)
    assert json.loads(out.read_text()) == row("ttft", prompt_tokens=1024, ttft_median=0.25)
    kept.add("ttft", prompt_tokens=8192, ttft_median=1.0)
    assert [one["prompt_tokens"] for one in rows.read([out])] == [1024, 8192]
    assert "ttft_median=0.25" in capsys.readouterr().out


def test_a_line_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("ttft")) + "\n" + '{"kind": "ttft"}\n')
    with pytest.raises(StackError, match=r"rows\.jsonl:2: .*no variant"):
        rows.read([path])
    path.write_text("{")
    with pytest.raises(StackError, match=r"rows\.jsonl:1: no row"):
        rows.read([path])
    with pytest.raises(StackError, match="nowhere"):
        rows.read([tmp_path / "nowhere"])


def test_the_command_names_files_without_their_folders(monkeypatch):
    monkeypatch.delenv("SM12X_MTP_FULL_GRAPHS", raising=False)
    found = rows.about(["--path", "native", "--out", "/a/b/rows.jsonl"], "abc")
    assert found["command"] == "python -m benchmarks.engine --path native --out rows.jsonl"
    assert found["commit"] == "abc"


def test_the_command_has_the_setting_of_graphs(monkeypatch):
    monkeypatch.setenv("SM12X_MTP_FULL_GRAPHS", "always")
    found = rows.about(["--start-only"], "abc")
    assert found["command"] == (
        "SM12X_MTP_FULL_GRAPHS=always python -m benchmarks.engine --start-only"
    )
