"""The emulated engine's stand-ins for vLLM's C++ operations, against the kernels that those launch.

With ``--sources``: nvcc compiles vLLM's CUDA sources for SM120, and the emulator runs the PTX. Code
between, which picks a kernel and launches it, is written out here again.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import nvcc
from emulator.machine import Program
from emulator.parse import parse
from native_kernels import EmulatedStream

from tests.engine.emulated import compiled_ops

# Of vLLM's libraries, one keeps to a part of PyTorch's headers that does not change.
STABLE = "-DTORCH_TARGET_VERSION=0x020A000000000000"
ENTRY = re.compile(r"\.entry\s+(\w+)")
BF16 = torch.bfloat16


class Sources:
    """vLLM's CUDA kernels by their file."""

    def __init__(self, folder: Path) -> None:
        self._csrc = folder / "csrc"

    @functools.cache  # noqa: B019 - as long as the module's tests.
    def _ptx(self, path: str) -> str:
        import sysconfig

        from torch.utils.cpp_extension import include_paths

        stable = path.startswith("libtorch_stable")
        return nvcc.compile_ptx(
            self._csrc / path,
            (self._csrc, *include_paths(), sysconfig.get_path("include")),
            (
                *("--expt-relaxed-constexpr", "--expt-extended-lambda", "-DUSE_CUDA"),
                *("-DTORCH_EXTENSION_NAME=_C", "-DENABLE_FP8", *([STABLE] if stable else [])),
            ),
        )

    def run(
        self, path: str, symbol: str, block: int, grid: tuple[int, ...], arguments, width: int = 0
    ) -> None:
        """Launch the kernel of a file whose mangled name contains ``symbol``."""
        ptx = self._ptx(path)
        (name,) = (name for name in ENTRY.findall(ptx) if symbol in name)
        program = Program(parse(ptx, name, block))
        # More than any of them needs, and no more than a GPU gives.
        stream = EmulatedStream(shared_bytes=32768)
        stream.launch(program, (*grid, 1, 1)[:3], arguments, width)


@pytest.fixture(scope="module")
def kernels(request) -> Sources:
    folder = request.config.getoption("--sources")
    if folder is None:
        pytest.skip("needs --sources")
    if nvcc.missing():
        pytest.skip(nvcc.missing())
    if not (folder / "csrc").is_dir():
        pytest.fail(f"--sources: no folder {folder / 'csrc'}")
    return Sources(folder.resolve())


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("hidden", [512, 1536, 4096])
def test_rms_norm(kernels, draw, hidden):
    values = torch.randn(7, hidden, generator=draw).to(BF16)
    weight = torch.randn(hidden, generator=draw).to(BF16)
    expected, found = (torch.full_like(values, math.nan) for _ in range(2))
    compiled_ops.rms_norm(expected, values, weight, 1e-6)
    kernels.run(
        "libtorch_stable/layernorm_kernels.cu",
        "rms_norm_kernelIN3c108BFloat16ELi8ELi2E",
        min(hidden // 8, 1024),
        (7,),
        (found, values, hidden, 0, 0, 0, 0, weight, 1e-6, 7, hidden),
    )
    # Another order of the sum moves a scale between two neighbours in float32.
    assert (found != expected).double().mean() < 1e-3
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


def test_activation(kernels, draw):
    values = (torch.randn(9, 512, generator=draw) * 8).to(BF16)
    expected, found = (torch.full((9, 256), math.nan, dtype=BF16) for _ in range(2))
    compiled_ops.silu_and_mul_with_clamp(expected, values, 10.0)
    kernels.run(
        "libtorch_stable/activation_kernels.cu",
        # The activation before the product, vectors, a limit, 16 bytes at a time.
        "act_and_mul_kernelIN3c108BFloat16E14__nv_bfloat162XadL_ZNS_11silu_kernelIS2_EET_RKS5_EE"
        "XadL_ZNS_18packed_silu_kernelIS3_EES5_S7_EELb1ELb1ELb1ELb0E",
        32,
        (9,),
        (found, values, 256, 10.0),
    )
    assert (found != expected).double().mean() < 1e-3
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


def test_per_token_group_quant(kernels, draw):
    values = torch.randn(16, 512, generator=draw) * torch.randn(16, 1, generator=draw).exp()
    values[3, 128:256] = 0
    values = values.to(BF16)
    for ue8m0 in (False, True):
        pairs = [
            (torch.full((16, 512), math.nan).to(torch.float8_e4m3fn), torch.full((16, 4), math.nan))
            for _ in range(2)
        ]
        settings = (128, 1e-10, -448.0, 448.0)
        compiled_ops.per_token_group_fp8_quant(values, *pairs[0], *settings, ue8m0)
        kernels.run(
            "libtorch_stable/quantization/w8a8/fp8/per_token_group_quant.cu",
            f"per_token_group_quant_8bit_kernelIN3c108BFloat16E13__nv_fp8_e4m3Lb0ELb{int(ue8m0)}E",
            256,
            (4,),
            (values, pairs[1][0], pairs[1][1], 128, 64, 16, *settings[1:], 0, 0),
        )
        assert pairs[0][0].view(torch.uint8).equal(pairs[1][0].view(torch.uint8))
        assert pairs[0][1].equal(pairs[1][1])


@pytest.mark.parametrize(
    ("tokens", "heads", "padded", "page"), [(5, 4, 8, 64), (7, 8, 8, 2), (1100, 2, 8, 64)]
)
def test_queries_and_keys(kernels, draw, tokens, heads, padded, page):
    """From 1,024 tokens on another kernel; graphs pad the tokens past the slots."""
    query = torch.randn(tokens, heads, 512, generator=draw).to(BF16)
    keys = torch.randn(tokens, 512, generator=draw)
    keys = (keys * torch.randn(tokens, 1, generator=draw).exp() ** 2).to(BF16)
    keys[0, :64] = 0
    inserted = tokens - 1
    pages = -(-tokens // page) + 1
    stride = page * 584 + 64
    caches = [torch.randint(0, 256, (pages, stride), dtype=torch.uint8, generator=draw)]
    caches.append(caches[0].clone())
    slots = torch.randperm(pages * page, generator=draw)[:inserted]
    slots[1] = -1
    positions = torch.randint(0, 100, (tokens,), generator=draw)
    table = torch.randn(100, 64, generator=draw)
    expected = compiled_ops.qnorm_rope_kv_rope_quant_insert(
        query, keys, caches[0], slots, positions, table, padded, 1e-6, page
    )
    found = torch.full_like(expected, math.nan)
    few = tokens < 1024
    kernels.run(
        "fused_deepseek_v4_qnorm_rope_kv_insert_kernel.cu",
        f"InsertKernel{'' if few else 'ReducedGrid'}IN3c108BFloat16ELi{padded}E",
        256,
        (-(-tokens * (padded + 1) // 8) if few else tokens,),
        (
            *(query, found, keys, caches[1], slots, positions, table, 1e-6),
            *(tokens, inserted, heads, page, stride),
        ),
    )
    # One rotation more is fused in the kernel, which moves a few numbers to the other neighbour.
    place = torch.arange(stride)
    rotated = (place < page * 576) & (place % 576 >= 448)
    differ = caches[0] != caches[1]
    assert not differ[:, ~rotated].any()
    assert differ[:, rotated].double().mean() < 1e-4
    assert (found != expected).double().mean() < 1e-4
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


def test_keys_of_the_indexer(kernels, draw):
    cache = torch.randint(0, 120, (9, 64, 132), dtype=torch.uint8, generator=draw)
    table = torch.randperm(9, generator=draw)[:8].view(2, 4).int()
    lengths = torch.tensor([0, 70, 70 + 200], dtype=torch.int32)
    # The last rows belong to nobody.
    results = [
        (torch.full((290, 128), 99, dtype=torch.uint8), torch.full((290, 4), 99, dtype=torch.uint8))
        for _ in range(2)
    ]
    compiled_ops.cp_gather_indexer_k_quant_cache(cache, *results[0], table, lengths)
    kernels.run(
        "cache_kernels.cu",
        "cp_gather_indexer_k_quant_cache_kernelILi16E",
        128,
        (-(-290 // 16), 1),
        (cache, *results[1], table, lengths, 2, 128, 128, 64 * 132, 132, 64, 4, 290, 128),
        width=8,
    )
    for one, other in zip(*results, strict=True):
        assert one.equal(other)


def same_sets(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.sort(1).values.equal(other.sort(1).values)


def test_top_k_of_a_prompt(kernels, draw):
    columns, stride = 700, 732
    logits = torch.randn(6, stride, generator=draw)[:, :columns]
    starts = torch.tensor([5, 9, 0, 100, 3, 0], dtype=torch.int32)
    ends = torch.tensor([8, 9, columns, 650, 515, 513], dtype=torch.int32)
    expected, found = (torch.full((6, 512), -9, dtype=torch.int32) for _ in range(2))
    compiled_ops.top_k_per_row_prefill(logits, starts, ends, expected, 6, stride, 1, 512)
    kernels.run(
        "sampler.cu",
        "topKPerRowPrefillILi512ELb0E",
        512,
        (6,),
        (logits, starts, ends, found, stride, 1, 512, 0),
    )
    assert same_sets(found, expected)


@pytest.mark.parametrize("lengths", [[900, 7], [[0], [5], [900]]])
def test_top_k_of_answers(kernels, draw, lengths):
    """Two requests of three tokens each, or a length for each row."""
    lengths = torch.tensor(lengths, dtype=torch.int32)
    each = lengths.dim() == 2
    rows, drafted = (3, 1) if each else (6, 3)
    logits = torch.randn(rows, 900, generator=draw)
    expected, found = (torch.full((rows, 512), -9, dtype=torch.int32) for _ in range(2))
    compiled_ops.top_k_per_row_decode(logits, drafted, lengths, expected, rows, 900, 1, 512)
    kernels.run(
        "sampler.cu",
        "topKPerRowDecodeILi512ELb0ELb0ELb0E",
        512,
        (rows,),
        (logits, lengths, found, 900, 1, 512, drafted, each, None, 0, None),
    )
    assert same_sets(found, expected)


@pytest.mark.parametrize("hashed", [False, True], ids=["scores", "table"])
def test_router(kernels, draw, hashed):
    """256 experts, by score with a bias, or by the token's number."""
    tokens, experts, chosen = 37, 256, 6
    logits = torch.randn(tokens, experts, generator=draw) * 3
    bias, ids, table = torch.randn(experts, generator=draw) * 0.1, None, None
    if hashed:
        ids = torch.randint(0, 50, (tokens,), generator=draw).int()
        rows = [torch.randperm(experts, generator=draw)[:chosen] for _ in range(50)]
        bias, table = None, torch.stack(rows).int()
    results = [
        [torch.full((tokens, chosen), math.nan)]
        + [torch.full((tokens, chosen), -9, dtype=torch.int32) for _ in range(2)]
        for _ in range(2)
    ]
    compiled_ops.topk_softplus_sqrt(*results[0], logits, True, 2.5, bias, ids, table)
    weights, indices, places = results[1]
    kernels.run(
        "moe/topk_softplus_sqrt_kernels.cu",
        f"topkGatingSoftplusSqrtILi8ELi256ELi4ELi16ELi32ELb{int(hashed)}EifE",
        128,
        (-(-tokens // 4),),
        (
            *(logits, None, weights, tokens, indices, places, chosen, 0, experts, True, 2.5),
            *(bias, ids, table),
        ),
        width=32,
    )
    assert results[0][1].equal(indices)
    # The kernel takes log(1 + exp(x)), which of a small weight leaves few places.
    torch.testing.assert_close(results[0][0], weights, rtol=1e-6, atol=1e-6)


def by_expert(routing) -> dict[int, list[int]]:
    """Pairs of each expert, and what fills its blocks up."""
    pairs, experts, used = routing
    block = len(pairs) // len(experts)
    found: dict[int, list[int]] = {}
    blocks = pairs[: int(used)].view(-1, block).tolist()
    for expert, some in zip(experts.tolist(), blocks, strict=False):
        found.setdefault(expert, []).extend(some)
    return {expert: sorted(some) for expert, some in found.items()}


@pytest.mark.parametrize(
    ("tokens", "experts", "chosen", "block"),
    [(5, 8, 2, 16), (200, 64, 4, 16), (300, 256, 6, 64), (3, 256, 6, 16)],
)
def test_alignment(kernels, draw, tokens, experts, chosen, block):
    """Few pairs of few experts take one kernel, others two."""
    ids = torch.stack([torch.randperm(experts, generator=draw)[:chosen] for _ in range(tokens)])
    ids = ids.int()
    pairs = ids.numel()
    blocks = -(-min(pairs + experts * (block - 1), pairs * block) // block)
    results = [
        [torch.full((size,), -7, dtype=torch.int32) for size in (blocks * block, blocks, 1)]
        for _ in range(2)
    ]
    compiled_ops.moe_align_block_size(ids, experts, block, *results[0], None)
    found = results[1]
    path, kind = "moe/moe_align_sum_kernels.cu", "i"
    if pairs < 1024 and experts <= 64:
        kernels.run(
            path,
            f"moe46moe_align_block_size_small_batch_expert_kernelI{kind}Li256E",
            256 + max(experts, 32),
            (1,),
            (ids, *found, None, experts, block, pairs, blocks * block, chosen, False),
        )
    else:
        padded, sums = -(-experts // 32) * 32, torch.full((experts + 1,), -7, dtype=torch.int32)
        more = (blocks * block, chosen, False)
        kernels.run(
            path,
            f"moe27moe_align_block_size_kernelI{kind}E",
            1024,
            (2,),
            (ids, *found, None, experts, padded, 32, block, pairs, sums, *more),
        )
        kernels.run(
            path,
            f"moe35count_and_sort_expert_tokens_kernelI{kind}E",
            256,
            (1, -(-pairs // 256)),
            (ids, found[0], sums, None, pairs, experts, *more),
        )
    assert results[0][2].equal(found[2])
    assert results[0][1].equal(found[1])
    assert by_expert(results[0]) == by_expert(found)
