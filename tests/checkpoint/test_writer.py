"""What is written: files, names, formats, sizes; and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.checkpoint.__main__ import main
from tests.checkpoint.digest import digest
from tests.checkpoint.layout import weights
from tests.checkpoint.sizes import config_of
from tests.checkpoint.writer import write_checkpoint


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, each from the shard that the index names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(folder / file, "pt") as shard:
            names = {name for name, place in index["weight_map"].items() if place == file}
            assert set(shard.keys()) == names
            found |= {name: shard.get_tensor(name) for name in names}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    return found


def test_the_index_names_every_tensor_of_every_shard(tiny):
    files = sorted(path.name for path in tiny.glob("*.safetensors"))
    assert len(files) == 3
    assert files[1] == "model-00002-of-00003.safetensors"
    tensors_of(tiny)


def test_a_layer_by_hand(tiny):
    """Names, shapes and dtypes of the C4A layer, written down and not computed."""
    f32, bf16, fp8, e8m0 = torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu
    expected = {
        "attn.attn_sink": (f32, (4,)),
        "attn.wq_a.weight": (fp8, (128, 256)),
        "attn.wq_a.scale": (e8m0, (1, 2)),
        "attn.q_norm.weight": (bf16, (128,)),
        "attn.wq_b.weight": (fp8, (2048, 128)),
        "attn.wq_b.scale": (e8m0, (16, 1)),
        "attn.wkv.weight": (fp8, (512, 256)),
        "attn.wkv.scale": (e8m0, (4, 2)),
        "attn.kv_norm.weight": (bf16, (512,)),
        "attn.wo_a.weight": (fp8, (256, 1024)),
        "attn.wo_a.scale": (e8m0, (2, 8)),
        "attn.wo_b.weight": (fp8, (256, 256)),
        "attn.wo_b.scale": (e8m0, (2, 2)),
        "attn.compressor.ape": (f32, (4, 1024)),
        "attn.compressor.wkv.weight": (bf16, (1024, 256)),
        "attn.compressor.wgate.weight": (bf16, (1024, 256)),
        "attn.compressor.norm.weight": (bf16, (512,)),
        "attn.indexer.wq_b.weight": (fp8, (2048, 128)),
        "attn.indexer.wq_b.scale": (e8m0, (16, 1)),
        "attn.indexer.weights_proj.weight": (bf16, (16, 256)),
        "attn.indexer.compressor.ape": (f32, (4, 256)),
        "attn.indexer.compressor.wkv.weight": (bf16, (256, 256)),
        "attn.indexer.compressor.wgate.weight": (bf16, (256, 256)),
        "attn.indexer.compressor.norm.weight": (bf16, (128,)),
        "attn_norm.weight": (bf16, (256,)),
        "ffn_norm.weight": (bf16, (256,)),
        "ffn.gate.weight": (bf16, (8, 256)),
        "ffn.gate.bias": (f32, (8,)),
        "hc_attn_fn": (f32, (24, 1024)),
        "hc_attn_base": (f32, (24,)),
        "hc_attn_scale": (f32, (3,)),
        "hc_ffn_fn": (f32, (24, 1024)),
        "hc_ffn_base": (f32, (24,)),
        "hc_ffn_scale": (f32, (3,)),
    }
    for part in ("w1", "w2", "w3"):
        expected[f"ffn.shared_experts.{part}.weight"] = (fp8, (256, 256))
        expected[f"ffn.shared_experts.{part}.scale"] = (e8m0, (2, 2))
        for expert in range(8):
            expected[f"ffn.experts.{expert}.{part}.weight"] = (torch.int8, (256, 128))
            expected[f"ffn.experts.{expert}.{part}.scale"] = (e8m0, (256, 8))
    found = {
        name.removeprefix("layers.1."): (tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors_of(tiny).items()
        if name.startswith("layers.1.")
    }
    assert found == expected


def test_what_each_kind_of_layer_has(tiny):
    names = tensors_of(tiny).keys()
    assert "layers.0.ffn.gate.tid2eid" in names
    assert "layers.0.ffn.gate.bias" not in names
    assert not any(name.startswith("layers.0.attn.compressor") for name in names)
    assert "layers.2.attn.compressor.ape" in names
    assert not any("layers.2.attn.indexer" in name for name in names)
    assert not any(name.startswith("layers.3") for name in names)
    outside = {name for name in names if not name.startswith(("layers.", "mtp.0."))}
    assert outside == {
        *("embed.weight", "head.weight", "norm.weight"),
        *("hc_head_fn", "hc_head_base", "hc_head_scale"),
    }
    block = {n.removeprefix("layers.0.") for n in names if n.startswith("layers.0.")}
    mtp = {n.removeprefix("mtp.0.") for n in names if n.startswith("mtp.0.")}
    assert mtp - block == {
        *("emb.tok_emb.weight", "head.weight", "enorm.weight", "hnorm.weight", "norm.weight"),
        *("e_proj.weight", "e_proj.scale", "h_proj.weight", "h_proj.scale"),
        *("hc_head_fn", "hc_head_base", "hc_head_scale", "ffn.gate.bias"),
    }
    assert block - mtp == {"ffn.gate.tid2eid"}


def test_values_follow_from_the_seed(tiny, tmp_path):
    write_checkpoint(tmp_path / "same", config_of("tiny"), shard_bytes=4 << 20)
    write_checkpoint(tmp_path / "other", config_of("tiny"), seed=1, shard_bytes=4 << 20)
    assert digest(tmp_path / "same") == digest(tiny)
    assert digest(tmp_path / "other") != digest(tiny)
    one, other = tensors_of(tiny), tensors_of(tmp_path / "other")
    assert one.keys() == other.keys()
    alike = [n for n in one if torch.equal(bytes_of(one[n]), bytes_of(other[n]))]
    # The factors of the hyper-connections are ones.
    assert all(name.endswith("_scale") for name in alike), alike


def test_the_digest_sees_one_byte(tiny, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert digest(copy) == digest(tiny)
    shard = copy / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert digest(copy) != digest(tiny)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00003"):
        digest(copy)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_values_are_sane(tiny):
    found = tensors_of(tiny)
    assert torch.equal(found["mtp.0.emb.tok_emb.weight"], found["embed.weight"])
    assert torch.equal(found["mtp.0.head.weight"], found["head.weight"])
    for name, tensor in found.items():
        if tensor.dtype in (torch.float32, torch.bfloat16):
            assert tensor.isfinite().all(), name
    table = found["layers.0.ffn.gate.tid2eid"]
    assert table.dtype == torch.int64
    assert all(len(set(row)) == 2 and set(row) <= set(range(8)) for row in table.tolist())
    # A scale that is lost, or taken from a neighbour, must show.
    for name in ("layers.0.attn.wq_b.scale", "layers.0.ffn.experts.0.w1.scale"):
        assert bytes_of(found[name]).unique().numel() > 2, name


def test_the_variance_of_a_linear_is_kept(tiny):
    found = tensors_of(tiny)
    values = found["layers.0.attn.wo_a.weight"].float()
    scales = torch.exp2(bytes_of(found["layers.0.attn.wo_a.scale"]).float() - 127)
    whole = values * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    # 16 blocks of other magnitudes, whose mean square is 1/1024 only on the whole.
    assert 0.3 < whole.square().mean().item() * 1024 < 3


@pytest.mark.parametrize(("size", "most"), [("tiny", 12e6), ("small", 40e6), ("wide", 26e9)])
def test_sizes(size, most):
    total = sum(weight.nbytes for weight in weights(config_of(size)))
    assert most * 0.9 < total < most


def test_wide_is_as_published_but_for_its_depth():
    config = config_of("wide")
    assert (config["hidden_size"], config["n_routed_experts"]) == (4096, 256)
    assert (config["vocab_size"], config["num_attention_heads"]) == (129280, 64)
    assert set(config["compress_ratios"]) == {0, 4, 128}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 200}, "hidden_size: 200, allowed: multiples of 128"),
        ({"moe_intermediate_size": 64}, "moe_intermediate_size: 64, allowed: multiples of 128"),
        ({"n_routed_experts": 12}, "n_routed_experts: 12, allowed: powers of two, 2 and more"),
        ({"num_experts_per_tok": 16}, "n_routed_experts: 8, allowed: powers of two, 16 and more"),
        ({"compress_ratios": (0, 8)}, r"compress_ratios: \[0, 8, 0\], allowed: entries of"),
        ({"compress_ratios": ()}, "compress_ratios"),
        ({"num_attention_heads": 3}, "num_attention_heads: 3, allowed: multiples of 2"),
        ({"num_hash_layers": 4}, "num_hash_layers: 4, allowed: 0 to 3"),
        ({"vocab_size": 100}, "vocab_size: 100, allowed: 320 and more"),
        ({"hiden_size": 256}, "hiden_size: no field of config.json"),
    ],
)
def test_a_configuration_that_cannot_be_laid_out_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("tiny", changes)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="size: 'huge', allowed: tiny, small, wide"):
        config_of("huge")


def test_nothing_is_overwritten(tiny):
    with pytest.raises(FileExistsError, match="is not empty"):
        write_checkpoint(tiny, config_of("tiny"))


def test_the_command_makes_what_it_says(tmp_path, capsys):
    folder = tmp_path / "made"
    words = [str(folder), "--size", "tiny", "--layers", "0", "--set", "num_hash_layers=0"]
    assert main(words) == 0
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 1
    assert f"digest {digest(folder)}" in capsys.readouterr().out
    assert main(words) == 1
    assert "error: " in capsys.readouterr().err
    assert main([str(tmp_path / "no"), "--set", "hidden_size=big"]) == 1
    assert "--set hidden_size=big: allowed" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
