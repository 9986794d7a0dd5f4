"""vLLM's own loader takes the checkpoint: every parameter filled, in whole, with the right values.

The loader runs in a child process (``loading/``), once for all tests here, on the checkpoint and on
spoilt copies of it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
INDEX = "model.safetensors.index.json"

# What each spoilt copy lacks, and what vLLM then leaves in part or says.
MISSING = {
    "layers.1.ffn.experts.3.w3.weight": "model.layers.1.ffn.experts.w13_weight",
    "layers.0.ffn.experts.7.w2.scale": "model.layers.0.ffn.experts.w2_weight_scale",
    "layers.2.attn.wkv.scale": "model.layers.2.attn.fused_wqa_wkv.weight_scale_inv",
    "layers.0.ffn.gate.tid2eid": "model.layers.0.ffn.gate.tid2eid",
    "layers.1.attn.indexer.compressor.wgate.weight": (
        "model.layers.1.attn.indexer.compressor.fused_wkv_wgate.weight"
    ),
    "mtp.0.e_proj.scale": "model.layers.3.e_proj.weight_scale_inv",
}


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def spoil(source: Path, target: Path, change) -> Path:
    """A copy of a checkpoint in one file, with ``change`` applied to its tensors."""
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, target / name)
    tensors = load_all(source)
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    place = dict.fromkeys(tensors, "model.safetensors")
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return target


@pytest.fixture(scope="module")
def loaded(tiny, tmp_path_factory):
    """What the child reports: ``tp1``, ``tp2``, and a spoilt copy by what was done to it."""
    spoilt = tmp_path_factory.mktemp("spoilt")

    def without_some(tensors):
        for name in MISSING:
            del tensors[name]

    def renamed(tensors):
        tensors["layers.0.attn.wo_c.weight"] = tensors.pop("layers.0.attn.wo_b.weight")

    def reshaped(tensors):
        name = "layers.0.attn.wo_b.weight"
        tensors[name] = tensors[name][:, :128].contiguous()

    jobs = {"tp1": (tiny, "1"), "tp2": (tiny, "2")}
    for change in (without_some, renamed, reshaped):
        jobs[change.__name__] = (spoil(tiny, spoilt / change.__name__, change), "1")
    words = [str(word) for job in jobs.values() for word in job]
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.loading.check_loading", *words],
        cwd=ROOT,
        # On the faked Hopper GPU, plain positions in window-only layers have to be asked for.
        env=os.environ
        | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "SM12X_PORTABLE": "window_rope"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(jobs, json.loads(done.stdout.splitlines()[-1]), strict=True))


pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("job", "ranks"), [("tp1", 1), ("tp2", 2)])
def test_every_parameter_is_loaded_in_whole(loaded, job, ranks):
    assert len(loaded[job]) == ranks
    for rank in loaded[job]:
        for part, least in (("model", 100), ("draft", 40)):
            assert len(rank[part]["parameters"]) > least
            assert rank[part]["partly"] == []
            assert rank[part]["unclaimed"] == []


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("tp", [1, 2])
def test_each_rank_holds_its_part(loaded, tiny, tp):
    """Which rows, columns and experts a parameter is made of, written down by hand."""
    tensors = load_all(tiny)

    def whole(*names):
        return torch.cat([tensors[name].view(torch.uint8) for name in names])

    def rows(name, rank):
        return tensors[name].view(torch.uint8).chunk(tp, 0)[rank]

    def columns(name, rank):
        return tensors[name].view(torch.uint8).chunk(tp, 1)[rank]

    experts = "layers.1.ffn.experts"
    for rank, report in enumerate(loaded[f"tp{tp}"]):
        sink = torch.full((64,), -torch.inf)
        sink[: 4 // tp] = tensors["layers.2.attn.attn_sink"].chunk(tp)[rank]
        expected = {
            "model.embed_tokens.weight": rows("embed.weight", rank),
            "lm_head.weight": rows("head.weight", rank),
            "model.layers.0.attn.fused_wqa_wkv.weight": whole(
                "layers.0.attn.wq_a.weight", "layers.0.attn.wkv.weight"
            ),
            "model.layers.0.attn.fused_wqa_wkv.weight_scale_inv": whole(
                "layers.0.attn.wq_a.scale", "layers.0.attn.wkv.scale"
            ),
            "model.layers.1.attn.wq_b.weight": rows("layers.1.attn.wq_b.weight", rank),
            "model.layers.1.attn.wo_a.weight": rows("layers.1.attn.wo_a.weight", rank),
            "model.layers.1.attn.wo_a.weight_scale_inv": rows("layers.1.attn.wo_a.scale", rank),
            "model.layers.1.attn.wo_b.weight": columns("layers.1.attn.wo_b.weight", rank),
            "model.layers.1.attn.indexer.wq_b.weight": whole("layers.1.attn.indexer.wq_b.weight"),
            "model.layers.1.attn.mla_attn.compressor.fused_wkv_wgate.weight": whole(
                "layers.1.attn.compressor.wkv.weight", "layers.1.attn.compressor.wgate.weight"
            ),
            "model.layers.2.attn.attn_sink": sink,
            "model.layers.0.ffn.gate.tid2eid": tensors["layers.0.ffn.gate.tid2eid"].int(),
            "model.layers.1.ffn.gate.e_score_correction_bias": tensors["layers.1.ffn.gate.bias"],
            "model.layers.1.ffn.experts.w13_weight": torch.stack(
                [
                    torch.cat([rows(f"{experts}.{e}.{w}.weight", rank) for w in ("w1", "w3")])
                    for e in range(8)
                ]
            ),
            "model.layers.1.ffn.experts.w2_weight": torch.stack(
                [columns(f"{experts}.{e}.w2.weight", rank) for e in range(8)]
            ),
            "model.layers.1.ffn.experts.w2_weight_scale": torch.stack(
                [columns(f"{experts}.{e}.w2.scale", rank) for e in range(8)]
            ),
        }
        found = report["model"]["parameters"]
        wrong = [name for name, value in expected.items() if found[name][2] != digest(value)]
        assert wrong == []
        drafted = {
            "model.embed_tokens.weight": rows("mtp.0.emb.tok_emb.weight", rank),
            "model.layers.3.shared_head.head.weight": rows("mtp.0.head.weight", rank),
            "model.layers.3.shared_head.norm.weight": tensors["mtp.0.norm.weight"],
            "model.layers.3.e_proj.weight": tensors["mtp.0.e_proj.weight"],
            "model.layers.3.h_proj.weight": tensors["mtp.0.h_proj.weight"],
            "model.layers.3.mtp_block.attn.wo_b.weight": columns("mtp.0.attn.wo_b.weight", rank),
        }
        found = report["draft"]["parameters"]
        wrong = [name for name, value in drafted.items() if found[name][2] != digest(value)]
        assert wrong == []


def test_positions_are_rotated_as_transformers_does(loaded, tiny):
    """Plain in window-only layers and the MTP layer, YaRN and another base in the others."""
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

    from tests.checkpoint.loading.check_loading import POSITIONS

    fields = json.loads((tiny / "config.json").read_text())
    del fields["quantization_config"]
    theirs = DeepseekV4RotaryEmbedding(DeepseekV4Config(**fields))
    positions = torch.tensor([POSITIONS])
    (rank,) = loaded["tp1"]
    found = rank["model"]["rotations"] | rank["draft"]["rotations"]
    kinds = {"layers.0.": "main", "layers.1.": "compress", "layers.2.": "compress"}
    kinds["layers.3."] = "main"
    seen = set()
    for name, rows in found.items():
        (layer,) = [one for one in kinds if f".{one}" in name]
        seen.add(layer)
        cos, sin = theirs(torch.zeros(1), positions, kinds[layer])
        expected = torch.cat((cos[0], sin[0]), dim=-1)
        # float32 knows an angle of 100,000 to 2**-7.
        assert torch.allclose(torch.tensor(rows), expected, atol=0.02), name
        assert torch.allclose(torch.tensor(rows)[:3], expected[:3], atol=1e-4), name
    assert seen == kinds.keys()


def test_a_missing_tensor_is_noticed(loaded):
    (rank,) = loaded["without_some"]
    partly = {*rank["model"]["partly"], *rank["draft"]["partly"]}
    assert partly == set(MISSING.values())


def test_a_tensor_that_vllm_does_not_expect_is_an_error(loaded):
    assert "wo_c" in loaded["renamed"]["error"]


def test_a_tensor_of_another_shape_is_an_error(loaded):
    assert loaded["reshaped"].keys() == {"error"}
