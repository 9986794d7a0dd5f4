"""The oracle on the tiny checkpoint: one layer at a time, sane, and with the engine's roundings."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from tests.oracle.__main__ import main
from tests.oracle.agreement import compare, table
from tests.oracle.faults import FAULTS
from tests.oracle.model import Exact, log_probabilities
from tests.oracle.roundings import Rounded, cached_key, fp8
from tests.oracle.scores import Scores, likeliest
from tests.oracle.sequences import Sequence
from tests.oracle.weights import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor but the MTP layer's, decoded here and not by ``transformers``."""
    stored = load_file(next(folder.glob("*.safetensors")))
    found = {}
    for name, value in stored.items():
        if name.endswith(".scale") or name.startswith("mtp."):
            continue
        scale = stored.get(name.removesuffix(".weight") + ".scale")
        if scale is not None:
            if value.dtype == torch.int8:
                packed = value.view(torch.uint8)
                codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
                value = _E2M1[codes & 7] * (1 - 2 * (codes >> 3))
            power = torch.exp2(scale.view(torch.uint8).float() - 127)
            for dim in (0, 1):
                power = power.repeat_interleave(value.shape[dim] // power.shape[dim], dim)
            value = value.float() * power
        found[name] = value
    return found


def config_of(folder: Path) -> DeepseekV4Config:
    fields = json.loads((folder / "config.json").read_text())
    del fields["quantization_config"]
    return DeepseekV4Config(**fields)


@pytest.fixture(scope="session")
def exact(tiny, sequences) -> list[torch.Tensor]:
    return list(log_probabilities(Checkpoint(tiny), sequences))


def stored(sequences, logprobs, fault=None) -> Scores:
    kept = [likeliest(one.numpy()) for one in logprobs]
    tokens, values = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    return Scores("tiny", sequences, tokens, values, 512, {"fault": fault})


def test_one_layer_at_a_time_is_the_whole_model(tiny, sequences, exact):
    whole, found = DeepseekV4ForCausalLM.from_pretrained(
        None,
        config=config_of(tiny),
        state_dict=dequantized(tiny),
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(found.values())
    for sequence, one in zip(sequences, exact, strict=True):
        with torch.no_grad():
            logits = whole(torch.tensor([sequence.tokens])).logits[0]
        assert torch.allclose(one, logits.log_softmax(-1), atol=1e-4, rtol=0)


def test_later_tokens_change_nothing(tiny, sequences, exact):
    longest = sequences[-1]
    for length in (130, 257):
        part = Sequence(longest.tokens[:length], length)
        (shorter,) = log_probabilities(Checkpoint(tiny), [part])
        apart = (shorter - exact[-1][:length]).abs()
        # Sums of another length round otherwise, and may choose between two equal entries.
        assert apart.median() < 1e-4
        assert apart.max() < 0.05


def test_streams_stay_near_one_and_text_varies(tiny, sequences, exact):
    sizes = []

    class Measuring(Exact):
        def layer(self, layer, streams, **inputs):
            after = super().layer(layer, streams, **inputs)
            sizes.append(after.square().mean().sqrt().item())
            return after

    list(log_probabilities(Checkpoint(tiny), sequences[-1:], Measuring()))
    assert len(sizes) == 3
    assert all(0.5 < size < 4 for size in sizes), sizes
    last = exact[-1].double()
    entropy = -(last.exp() * last).sum(-1)
    assert 0.5 < entropy.mean() < 5
    assert last.argmax(-1).unique().numel() > len(last) // 4


def test_a_missing_tensor_is_an_error(tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("layers.1.attn.indexer.compressor.ape", "norm.weight"):
        del index["weight_map"][name]
        path.write_text(json.dumps(index))
        with pytest.raises(ValueError, match="missing"):
            Checkpoint(copy).layer(1)


def test_fp8_rounds_to_what_a_scaled_cast_gives():
    values = torch.tensor([[448.0, 1.0, 0.0, -3.3], [0.5, 449.0, 100.0, 1e-3]])
    # The first row's scale is 1; the second's is 2.
    expected = torch.tensor([[448.0, 1.0, 0.0, -3.25], [0.5, 448.0, 96.0, 0.0]])
    expected[1, 3] = torch.tensor(1e-3 / 2).to(torch.float8_e4m3fn).float() * 2
    expected[1, 2] = torch.tensor(50.0).to(torch.float8_e4m3fn).float() * 2
    assert torch.equal(fp8(values, 4), expected)
    # With 3.3 / 448 as scale, 1 is 135.8 of it, and 128 and 144 are e4m3's numbers around.
    close = fp8(torch.tensor([[1.0, 0.0, -3.3, 0.0]]), 4, power_of_two=False)
    assert torch.allclose(close, torch.tensor([[128 * 3.3 / 448, 0.0, -3.3, 0.0]]))
    with pytest.raises(ValueError, match="allowed: multiples of 3"):
        fp8(values, 3)


def test_a_cached_key_keeps_its_rotated_part():
    key = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    rounded = cached_key(key, 64)
    assert torch.equal(rounded[:, 448:], key[:, 448:].to(torch.bfloat16).float())
    error = (rounded[:, :448] - key[:, :448]).abs().mean() / key.abs().mean()
    assert 0.01 < error < 0.04


def test_with_no_rounding_the_rounded_layer_is_the_layer(tiny, sequences, exact, monkeypatch):
    import tests.oracle.roundings as roundings

    monkeypatch.setattr(roundings, "bf16", lambda values: values)
    monkeypatch.setattr(roundings, "fp8", lambda values, group, power_of_two=True: values)
    plain = list(log_probabilities(Checkpoint(tiny), sequences, Rounded()))
    for one, other in zip(exact, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=0)


def test_the_roundings_move_results_a_little(tiny, sequences, exact):
    rounded = stored(sequences, log_probabilities(Checkpoint(tiny), sequences, Rounded()))
    reference = stored(sequences, exact)
    figures = table(reference, compare(reference, rounded))["all"]
    assert 1e-3 < figures.mean_kl < 0.5
    assert figures.same_top > 0.6


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_changes_results(tiny, sequences, exact, name):
    faulty = stored(sequences, log_probabilities(Checkpoint(tiny, fault=name), sequences))
    reference = stored(sequences, exact)
    assert compare(reference, faulty).kl.mean() > 1e-6


def test_an_unknown_fault_is_refused(tiny):
    with pytest.raises(ValueError, match="fault: 'none', allowed: window_yarn, "):
        Checkpoint(tiny, fault="none")


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.oracle", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_command_finds_a_fault_and_passes_the_noise(tiny, tmp_path, capsys):
    """A run is made and compared by the command, the others by what it calls in this process."""
    faulty = ["--fault", "no_sinks"]
    runs = {"rounded": ["--rounded"], "faulty": faulty, "both": [*faulty, "--rounded"]}

    def score(name, *options):
        return ["score", tiny, "--out", tmp_path / name, "--prompts", "200", *options]

    done = command(*score("exact"))
    assert done.returncode == 0, done.stderr[-2000:]
    for name, options in runs.items():
        assert main([str(word) for word in score(name, *options)]) == 0
    judged = ["--noise", tmp_path / "rounded", "--faults", tmp_path / "faulty"]

    def compared(name, *options):
        return ["compare", tmp_path / "exact", tmp_path / name, *options]

    report = tmp_path / "report.json"
    right = command(*compared("rounded", *judged, "--out", report))
    assert right.returncode == 0, right.stdout + right.stderr
    assert json.loads(report.read_text())["problems"] == []
    capsys.readouterr()
    assert main([str(word) for word in compared("both", *judged)]) == 1
    assert "problem: no_sinks: share" in capsys.readouterr().out
    assert main([str(word) for word in compared("absent")]) == 2
    assert "error: " in capsys.readouterr().err
