"""The short size with the tokenizer of a made checkpoint, a byte a token: every prompt can be made.

The counts are vLLM's own. Programs that bring their prompts (``vllm bench serve``, ``lm_eval``) are
not run here.
"""

from __future__ import annotations

import json
import subprocess

import pytest

from gates.spec import load_gates
from stack.pin import ROOT
from tests.gates.conftest import Run
from tests.gates.fake_server import End, FakeServer, Say
from tests.gates.test_real_server import SERVING

OTHERS = {"mt-bench", "gsm8k"}
# They send no chat.
SILENT = {"logprobs", "runtime-errors"}
GATES = [gate.sized("short") for gate in load_gates().values()]


@pytest.fixture(scope="module")
def count(tmp_path_factory):
    """``count(messages)``: their tokens with the made tokenizer and vLLM's chat template."""
    assert SERVING.exists(), f"{SERVING} is missing: ./test.sh makes it"
    folder = tmp_path_factory.mktemp("tokenizer")
    with subprocess.Popen(
        [str(SERVING), "-m", "tests.gates.made_tokenizer", str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:

        def ask(messages):
            process.stdin.write(json.dumps(messages) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield ask


def answered(body):
    """What ``/v1/completions`` gives for log-probabilities, three tokens for any prompt."""
    given = {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -0.1, -0.1],
        "top_logprobs": [None, {"b": -0.1}, {"c": -0.1}],
    }
    return {"choices": [{"logprobs": given}], "usage": {"prompt_tokens": 2}}


@pytest.fixture(scope="module")
def measured(count, tmp_path_factory):
    """A run of every gate in its short size."""
    place = tmp_path_factory.mktemp("short")
    with FakeServer(lambda body, number: [Say(0.0, "one"), End()]) as fake:
        fake.count = count
        fake.complete = answered
        fake.prefix_cache = True
        fake.counters["vllm:spec_decode_num_drafts"] = 0
        options = {"write_reference": str(place / "reference.json")}
        return Run(fake, place / "run", GATES, options=options, profile="h200")()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("gate", [gate.name for gate in GATES])
def test_every_prompt_of_the_short_size_can_be_made_of_bytes(measured, gate):
    cells = measured.of("cell", gate=gate)
    assert [cell["error"] for cell in cells if cell["error"]] == []
    assert bool(cells) is (gate not in OTHERS)
    requests = measured.of("request", gate=gate)
    assert bool(requests) is (gate not in OTHERS | SILENT)
    for row in requests:
        assert not row["answer"]["fault"], row["answer"]
        wanted, got = row["note"].get("wanted_tokens"), row["answer"]["prompt_tokens"]
        if wanted is not None:
            assert abs(got - wanted) <= max(4, wanted * 0.002), row["cell"]


def test_the_full_size_asks_for_the_published_lengths():
    """What makes the short size possible with a made tokenizer must not touch the full one."""
    full = load_gates()
    assert full["startup"].params["prompt_tokens"] == 256
    asked = {
        name: {
            stream["prompt_tokens"]
            for case in full[name].params["cases"]
            for stream in case["streams"]
        }
        for name in ("mixed-arrival", "streaming-pressure")
    }
    assert asked == {
        "mixed-arrival": {4047, 58980, 124080},
        "streaming-pressure": {1024, 2048, 4096, 16384, 58980, 100127},
    }
