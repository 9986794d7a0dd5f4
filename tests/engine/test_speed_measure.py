"""What the speed measurement sends and writes, on a fake server that plays and misbehaves."""

from __future__ import annotations

import asyncio
import json
import stat
import statistics
import sys
import time

import pytest
from aiohttp import web

from benchmarks.engine import __main__ as program
from benchmarks.engine import model, rows
from benchmarks.engine.measure import Bench, Budget, Failed, OutOfTime, Plan
from gates import client
from tests.gates.fake_server import LATE, Disconnect, FakeServer, Hang, Say, Sent, Status, steady

VOCABULARY = 1000
SMALL = Plan(
    ttft=(64,), concurrency=(1, 2), decode_prompt=32, decode_tokens=16, repeats=2, requests=3
)


class FakeCompletions(FakeServer):
    """As the fake server, with completions of token ids, streamed."""

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        # The rest are the fake template's.
        text = " ".join("w" for _ in range(len(body["prompt"]) - 7))
        sent = Sent(body | {"messages": [{"content": text}]}, time.monotonic())
        self.sent.append(sent)
        steps = self.play(body, len(self.sent) - 1)
        if isinstance(steps[0], Status):
            return web.Response(status=steps[0].code, text=steps[0].text)
        return await self._stream(request, sent, steps)


def tokens_asked(body, number):
    """So many chunks of one token as are asked for."""
    return steady(0.002, 0.001, body["max_tokens"])


@pytest.fixture
def fake():
    with FakeCompletions(tokens_asked) as one:
        yield one


class Kept(rows.Rows):
    """Rows in memory."""

    def __init__(self):
        super().__init__({})
        self.all = []

    def add(self, kind, **figures):
        self.all.append({"kind": kind, **figures})
        return self.all[-1]


def run(fake, tmp_path, work, seconds=60.0):
    """``await work(bench)`` on a fake server; the rows, and what ended it."""
    kept = Kept()

    async def go():
        async with client.http(fake.url) as http:
            log = tmp_path / "compiled.jsonl"
            await work(Bench(http, "fake-model", VOCABULARY, kept, Budget(seconds), log))

    ended = None
    try:
        asyncio.run(go())
    except (Failed, OutOfTime) as error:
        ended = error
    return kept.all, ended


def test_every_cell_has_a_row_and_warm_ups_are_rows_of_their_own(fake, tmp_path):
    found, ended = run(fake, tmp_path, lambda bench: bench.all(SMALL))
    assert ended is None
    assert [(row["kind"], row.get("of"), row["requests"]) for row in found] == [
        ("request", None, 1),
        ("request", None, 1),
        ("warm-up", "decode", 1),
        ("decode", None, 2),
        ("warm-up", "decode", 2),
        ("decode", None, 4),
        ("warm-up", "ttft", 1),
        ("ttft", None, 2),
    ]
    assert all(row["failures"] == 0 for row in found)


def test_prompts_have_the_asked_lengths_and_are_never_alike(fake, tmp_path):
    run(fake, tmp_path, lambda bench: bench.all(SMALL))
    prompts = [tuple(sent.body["prompt"]) for sent in fake.sent]
    assert {len(prompt) for prompt in prompts} == {256, 32, 64}
    assert len(set(prompts)) == len(prompts)
    assert all(320 <= token < VOCABULARY for prompt in prompts for token in prompt)
    for sent in fake.sent:
        assert sent.body["temperature"] == 0.0
        assert sent.body["ignore_eos"] is True


def test_figures_are_those_that_were_played(fake, tmp_path):
    """First token after 0.5 s, then one each 50 ms, and what the machine adds to them."""
    fake.play = lambda body, number: steady(0.5, 0.05, body["max_tokens"])
    (_, row), _ = run(fake, tmp_path, lambda bench: bench.decode(2, SMALL))
    assert (row["kind"], row["concurrency"], row["prompt_tokens"]) == ("decode", 2, 32)
    # After the two of the warm-up. By the server's own record, closer than to the plan.
    counted = fake.sent[2:]
    assert len(counted) == 2 * SMALL.repeats
    first = statistics.median(sent.ttft for sent in counted)
    span = statistics.median(sent.span for sent in counted)
    assert row["ttft_median"] == pytest.approx(first, abs=LATE)
    assert row["tpot_median"] == pytest.approx(span / 15, abs=LATE / 15)
    assert row["completion_tokens_mean"] == 16


def test_so_many_requests_run_at_a_time(fake, tmp_path):
    def open_at_once():
        moments = [(sent.came, 1) for sent in fake.sent]
        moments += [(sent.ended, -1) for sent in fake.sent]
        count = most = 0
        for _, change in sorted(moments):
            count += change
            most = max(most, count)
        return most

    plan = Plan(random_prompt=32, random_tokens=8, requests=5)
    (warm, row), _ = run(fake, tmp_path, lambda bench: bench.random(2, plan))
    assert (warm["kind"], warm["of"], warm["requests"]) == ("warm-up", "random", 2)
    assert (row["kind"], row["requests"], row["temperature"]) == ("random", 5, 0.0)
    assert len(fake.sent) == 2 + 5
    assert open_at_once() == 2


def test_acceptance_is_what_the_counters_grew_by(fake, tmp_path):
    def play(body, number):
        fake.counters["vllm:spec_decode_num_drafts"] += 10
        fake.counters["vllm:spec_decode_num_draft_tokens"] += 20
        fake.counters["vllm:spec_decode_num_accepted_tokens"] += 5
        return tokens_asked(body, number)

    fake.play = play
    (_, row), _ = run(fake, tmp_path, lambda bench: bench.decode(1, SMALL))
    assert (row["acceptance"], row["acceptance_length"]) == (0.25, 1.5)


def test_what_was_compiled_meanwhile_is_in_the_row(fake, tmp_path):
    def play(body, number):
        with (tmp_path / "compiled.jsonl").open("a") as lines:
            lines.write(json.dumps({"at": 1.0, "kernel": f"k{number}", "s": 0.5}) + "\n")
        return tokens_asked(body, number)

    fake.play = play
    (warm, row), _ = run(fake, tmp_path, lambda bench: bench.time_to_first_token(64, 2))
    assert (warm["compiled"], warm["compiled_kernels"]) == (1, ["k0"])
    assert (row["compiled"], row["compiled_kernels"]) == (2, ["k1", "k2"])


@pytest.mark.parametrize(
    ("steps", "fault"),
    [
        ([Say(0.0), Disconnect()], "disconnected"),
        ([Status(500, "no")], "http"),
        (steady(0.0, 0.0, 3), "usage"),  # fewer tokens than were asked for
    ],
)
def test_a_request_that_fails_ends_the_run_with_its_row(fake, tmp_path, steps, fault):
    fake.play = lambda body, number: steps
    found, ended = run(fake, tmp_path, lambda bench: bench.first_requests())
    assert isinstance(ended, Failed)
    assert fault in str(ended)
    assert len(found) == 1
    assert found[0]["fault"].startswith(fault)


def test_a_hang_ends_with_the_budget(fake, tmp_path):
    fake.play = lambda body, number: [Hang()]
    began = time.monotonic()
    found, ended = run(fake, tmp_path, lambda bench: bench.first_requests(), seconds=1.5)
    assert isinstance(ended, OutOfTime)
    assert time.monotonic() - began < 10
    assert found[0]["failures"] == 1


def test_a_wave_that_would_outlast_the_budget_is_not_begun(fake, tmp_path):
    fake.play = lambda body, number: steady(1.0, 0.0, body["max_tokens"])
    found, ended = run(fake, tmp_path, lambda bench: bench.time_to_first_token(64, 5), seconds=2.9)
    assert isinstance(ended, OutOfTime)
    assert "ttft prompt_tokens=64" in str(ended)
    assert len(fake.sent) < 5


def test_the_kinds_of_the_layers():
    assert model.compress_ratios(5) == (0, 4, 128, 4, 128)
    assert model.compress_ratios(7) == (0, 4, 128, 4, 128, 4, 128)
    published = model.compress_ratios(43)
    assert (len(published), published[:4], published[-1]) == (43, (0, 0, 4, 128), 4)
    for layers in (4, 44):
        with pytest.raises(ValueError, match="allowed: 5 to 43"):
            model.compress_ratios(layers)


def test_the_folder_of_the_whole_model_has_its_tokenizer(tmp_path):
    size = model.write_model(tmp_path / "m", 43)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_hash_layers"]) == (43, 3)
    assert len(config["compress_ratios"]) == 44
    tokenizer = json.loads((tmp_path / "m" / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) == size == 129280


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--path"),
        (["--path", "fast"], "portable, native"),
        (["--path", "native"], "--caches"),
        (["--path", "native", "--caches", "c", "--layers", "4"], "5 to 43"),
        (["--path", "native", "--caches", "c", "--tp", "0"], "1 and more"),
        (["--path", "native", "--caches", "c", "--budget", "3"], "more than 15"),
        (["--path", "native", "--caches", "c", "--concurrency", "9"], "--max-num-seqs 8"),
    ],
)
def test_a_wrong_command_line_says_what_is_allowed(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        program.checked(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.replace("'", "")


def serve_by(folder, body):
    """A program in place of the Python that serves."""
    path = folder / "serve"
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def call(tmp_path, serve, *words):
    out = tmp_path / "rows.jsonl"
    status = program.main(
        [
            *("--path", "native", "--caches", str(tmp_path / "caches"), "--out", str(out)),
            *("--python", str(serve), "--commit", "abc", *words),
        ]
    )
    return status, rows.read([out])


def test_a_server_that_ends_at_once_is_a_row(tmp_path):
    serve = serve_by(tmp_path, "print('CUDA went away'); raise SystemExit(7)")
    status, (row,) = call(tmp_path, serve)
    assert (status, row["kind"], row["variant"]) == (1, "failed", "native")
    assert "status 7" in row["why"] and "CUDA went away" in row["why"]


def test_a_server_that_never_answers_is_stopped_with_the_budget(tmp_path):
    serve = serve_by(tmp_path, "import time; print('loading', flush=True); time.sleep(600)")
    began = time.monotonic()
    status, (row,) = call(tmp_path, serve, "--budget", "22")
    assert (status, row["kind"]) == (1, "failed")
    assert "no server after" in row["why"] and "loading" in row["why"]
    assert time.monotonic() - began < 30


HANGS = """
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        time.sleep(600)
    def log_message(self, *words):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_a_spent_budget_is_said_and_has_its_own_status(tmp_path):
    status, found = call(tmp_path, serve_by(tmp_path, HANGS), "--budget", "24")
    assert status == 3
    assert [row["kind"] for row in found] == ["start", "request", "stopped"]
    assert found[-1]["before"] == "request number=1"
    assert "the budget of 24 s is spent" in found[-1]["why"]


def test_the_report_of_no_file_is_an_error(tmp_path, capsys):
    assert program.main(["--report", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capsys.readouterr().err
