"""The Triton einsum kernel: its table, and real shapes on a GPU; small in ``emulated/``."""

from __future__ import annotations

import math

import pytest
import torch
from capture import record, replay_on_gpu
from einsum_checks import check
from test_fp8_einsum import BLOCK, E4M3, draw

from vllm_sm12x.ops.fp8_einsum import fp8_einsum_bhr_hdr
from vllm_sm12x.ops.fp8_einsum.config import CHUNK, TABLE, TOKENS, EinsumConfig, einsum_config


def test_every_target_has_every_class_of_tokens():
    assert set(TABLE) == {"sm_90", "sm_120", "sm_121"}
    for table in TABLE.values():
        assert set(table) == {*TOKENS, CHUNK}


@pytest.mark.parametrize(
    ("tokens", "name"),
    [
        (0, "8"),
        (1, "8"),
        (8, "8"),
        (9, "16"),
        (24, "32"),
        (256, "256"),
        (257, CHUNK),
        (9999, CHUNK),
    ],
)
def test_the_class_of_a_number_of_tokens(tokens, name):
    assert einsum_config("sm_120", tokens) is TABLE["sm_120"][name]


def test_a_target_without_a_table_is_an_error():
    with pytest.raises(ValueError, match="target: 'sm_80', allowed: sm_120, sm_121, sm_90"):
        einsum_config("sm_80", 1)


@pytest.mark.parametrize(("weights_first", "warps"), [(False, 4), (True, 8)])
def test_parts_that_the_kernel_cannot_make_are_an_error(weights_first, warps):
    with pytest.raises(ValueError, match="with parts, allowed: weights_first and at most a warp"):
        EinsumConfig(8, 32, weights_first, warps, num_stages=3, parts=4)


def test_an_unknown_implementation_is_an_error():
    arguments = draw(2, 1, 128, 128)
    with pytest.raises(ValueError, match="implementation: 'cuda', allowed: reference, triton"):
        fp8_einsum_bhr_hdr(*arguments, implementation="cuda")
    assert arguments[-1].isnan().all()


def test_no_gpu_is_an_error():
    arguments = draw(2, 1, 128, 128)
    with pytest.raises(ValueError, match="a: device cpu, allowed in the Triton einsum kernel"):
        fp8_einsum_bhr_hdr(*arguments, implementation="triton")
    assert arguments[-1].isnan().all()


def engine_arguments(num_tokens, groups=8, k=4096, n=1024, seed=0, device="cuda"):
    """As the engine has them: groups outermost, tokens of scales innermost, NaN in the padding."""
    generator = torch.Generator(device).manual_seed(seed)
    kinds = dict(generator=generator, device=device)
    a = torch.randn(groups, num_tokens, k, **kinds).mul(100).clamp(-448, 448).to(E4M3)
    a_scale = torch.full((groups, k // BLOCK, -(-num_tokens // 4) * 4), math.nan, device=device)
    drawn = torch.rand(groups, k // BLOCK, num_tokens, **kinds)
    a_scale[..., :num_tokens] = torch.exp2((drawn * 4).floor() - 9)
    b = torch.randn(groups, n, k, **kinds).mul(100).clamp(-448, 448).to(E4M3)
    b_scale = torch.rand(groups, n // BLOCK, k // BLOCK, **kinds) * 0.01 + 1e-4
    out = torch.full((num_tokens, groups, n), math.nan, dtype=torch.bfloat16, device=device)
    return dict(
        a=a.transpose(0, 1),
        a_scale=a_scale.permute(2, 0, 1)[:num_tokens],
        b=b,
        b_scale=b_scale,
        out=out,
    )


def run(**given):
    fp8_einsum_bhr_hdr(**given, implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 12, 24, 33, 96, 200, 300])
def test_the_engines_shape_on_a_gpu(lowered, num_tokens):
    given = engine_arguments(num_tokens, seed=num_tokens)
    run(**given)
    check(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 4])
def test_fewer_groups_on_a_gpu(lowered, groups):
    """What tensor parallelism leaves a GPU."""
    for num_tokens in (5, 70):
        given = engine_arguments(num_tokens, groups=groups)
        run(**given)
        check(**given)


@pytest.mark.gpu
def test_a_full_chunk_on_a_gpu(lowered):
    given = engine_arguments(4096 + 5)
    run(**given)
    assert given["out"].isfinite().all()
    some = torch.tensor([*range(40), *range(40, 4096, 101), *range(4090, 4101)], device="cuda")
    given["a"] = given["a"].view(torch.uint8)[some].view(E4M3)
    given["a_scale"], given["out"] = given["a_scale"][some], given["out"][some]
    check(**given)


@pytest.mark.gpu
def test_weights_as_the_checkpoint_has_them_on_a_gpu(lowered):
    """Two dimensions and UE8M0 scales give what three and float32 give."""
    given = engine_arguments(9)
    exponents = (torch.arange(given["b_scale"].numel(), device="cuda") % 9 + 112).to(torch.uint8)
    exponents = exponents.view_as(given["b_scale"])
    given["b_scale"] = torch.exp2(exponents.float() - 127)
    run(**given)
    flat = given | {
        "b": given["b"].flatten(0, 1),
        "b_scale": exponents.flatten(0, 1).view(torch.float8_e8m0fnu),
        "out": torch.full_like(given["out"], math.nan),
    }
    run(**flat)
    assert torch.equal(flat["out"], given["out"])
    check(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [3, 80, 300])
def test_nan_stays_where_it_belongs_on_a_gpu(lowered, num_tokens):
    given = engine_arguments(num_tokens, groups=2, k=256, n=256)
    given["a"][1, 0, 5] = math.nan
    given["b_scale"][1, 1, 1] = math.nan
    run(**given)
    expected = torch.zeros_like(given["out"], dtype=torch.bool)
    expected[1, 0] = True
    expected[:, 1, 128:] = True
    assert torch.equal(given["out"].isnan(), expected)


@pytest.mark.gpu
def test_activations_beyond_two_to_the_31_bytes_on_a_gpu():
    """The last token of 70,000 begins there; its scales and its result do not matter to others."""
    num_tokens = 70_000
    a = torch.zeros(num_tokens, 8, 4096, dtype=torch.uint8, device="cuda").view(E4M3)
    given = engine_arguments(3)
    a[-3:].copy_(given["a"])
    a_scale = torch.ones(num_tokens, 8, 32, device="cuda")
    a_scale[-3:] = given["a_scale"]
    out = torch.full((num_tokens, 8, 1024), math.nan, dtype=torch.bfloat16, device="cuda")
    run(a=a, a_scale=a_scale, b=given["b"], b_scale=given["b_scale"], out=out)
    assert out[:-3].eq(0).all()
    check(**given | {"out": out[-3:]})


@pytest.mark.gpu
def test_nothing_is_allocated_on_a_gpu():
    given = engine_arguments(24)
    assert record(fp8_einsum_bhr_hdr, **given, implementation="triton").peak_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 24, 130])
def test_a_captured_graph_follows_its_inputs(num_tokens):
    first, second = (engine_arguments(num_tokens, seed=seed, device="cpu") for seed in (1, 2))
    _, after = replay_on_gpu(run, first, second)
    on_gpu = {name: tensor.cuda() for name, tensor in second.items() if name != "out"}
    check(**on_gpu, out=after["out"].cuda())
