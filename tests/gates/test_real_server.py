"""A real server without a GPU: `transformers serve` with a tiny model made on the spot.

It differs from vLLM in what the suite must bear: no ``/tokenize``, no ``/metrics``, no list of
models, usage in the last event alone, chunks of several tokens and no closing ``[DONE]``.
"""

from __future__ import annotations

import json
import socket

import pytest

from gates.__main__ import main
from gates.results import results
from gates.store import RunFolder
from stack.pin import ROOT
from tests.gates.conftest import gate

# The environment of the wheel, which test.sh makes for the parts that test it.
SERVING = ROOT / ".build" / "test-env" / "bin" / "python"
ANSWER = 24


def gates(folder):
    """The gates of this test as files, as a user would write them."""
    load = {"prompt": "archive", "prompt_tokens": 700, "max_tokens": ANSWER}
    primary = {"role": "primary", "prompt_tokens": 400, "max_tokens": 2 * ANSWER}
    secondary = {"role": "secondary", "prompt_tokens": 700, "max_tokens": ANSWER}
    made = [
        gate(
            name="start",
            workload="startup",
            order=0,
            params={"prompt_tokens": 400, "max_tokens": 8},
            columns=[{"head": "Request", "figure": "request"}],
        ),
        gate(name="load", order=1, params={"cases": [load | {"concurrency": [1, 2]}]}),
        gate(
            name="arrival",
            workload="arrival",
            order=2,
            params={
                "cases": [
                    {
                        "name": "both",
                        "streams": [primary, secondary | {"after_first_token_of": "primary"}],
                    }
                ]
            },
            columns=[{"head": "Case", "figure": "case"}],
        ),
    ]
    folder.mkdir()
    for one in made:
        kept = one.model_dump(exclude_defaults=True)
        kept["timeouts"] = {"first_token_s": 60.0, "stall_s": 60.0, "total_s": 120.0}
        lines = [f"{name} = {_toml(value)}" for name, value in kept.items()]
        (folder / f"{one.name}.toml").write_text("\n".join(lines) + "\n")
    return folder


def _toml(value):
    """Plain values as TOML's inline form."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    return json.dumps(value)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run of the gates on the server, started and stopped by the runner."""
    assert SERVING.exists(), f"{SERVING} is missing: ./test.sh makes it"
    place = tmp_path_factory.mktemp("real")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    (place / "hf" / "hub").mkdir(parents=True)
    model, out = place / "model", place / "run"
    status = main(
        [
            *("run", "--url", f"http://127.0.0.1:{port}", "--model", str(model)),
            *("--profile", "h200", "--gates", str(gates(place / "gates")), "--out", str(out)),
            *("--ready-within", "240", "--", "env"),
            *(f"HF_HOME={place / 'hf'}", "HF_HUB_OFFLINE=1", "CUDA_VISIBLE_DEVICES="),
            *(str(SERVING), str(ROOT / "tests" / "gates" / "serve_tiny.py"), str(model), str(port)),
        ]
    )
    return status, RunFolder.read(out)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_gate_passes(measured):
    status, folder = measured
    told = {result.gate.name: (result.status, result.why) for result in results(folder)}
    assert told == {name: ("passed", []) for name in ("start", "load", "arrival")}
    assert status == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_counts_are_the_servers_and_not_the_chunks(measured):
    _, folder = measured
    answers = [row["answer"] for row in folder.of("request", gate="load")]
    assert len(answers) == 2 * (1 + 2)
    assert {answer["completion_tokens"] for answer in answers} == {ANSWER}
    # Bytes that are no character yet are held back: fewer chunks than tokens.
    assert any(len(answer["chunk_at"]) < ANSWER for answer in answers)
    assert {token for answer in answers for token in answer["chunk_tokens"]} == {None}
    for answer in answers:
        assert answer["prompt_tokens"] > 1000, "a byte is a token here, and nothing counted it"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_start_is_timed_and_the_first_request_is_a_row(measured):
    _, folder = measured
    start = next(result for result in results(folder) if result.gate.name == "start")
    assert [row.key["request"] for row in start.rows] == ["first", "second"]
    assert 1 < start.rows[0].figures["ready_s"] < 240
    assert folder.about["machine"]["serving"]["packages"]["torch"].startswith("2.")
    assert (folder.path / "logs" / "server.log").stat().st_size > 0
    assert "env HF_HOME" in (folder.path / "report.md").read_text()
