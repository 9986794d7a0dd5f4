"""With how many programs vLLM's Triton kernel gathers the keys of a request that is read."""

from __future__ import annotations

import pytest
import torch

from tests.dispatch.test_cutedsl import Kernel


@pytest.fixture
def grid(monkeypatch):
    """``grid(requests, tokens)``: of the launch of vLLM's gather into so many rows each."""
    from vllm.models.deepseek_v4.common.ops import cache_utils

    from vllm_sm12x.adapters import key_gather

    monkeypatch.setattr(key_gather, "multiprocessors", lambda: 188)
    kernel = Kernel()
    monkeypatch.setattr(cache_utils, "_dequantize_and_gather_k_kernel", kernel)

    def gather(requests: int, tokens: int) -> tuple[int, int]:
        cache_utils.dequantize_and_gather_k_cache_triton(
            torch.empty(requests, tokens, 512, dtype=torch.bfloat16, device="meta"),
            torch.empty(9, 64, 584, dtype=torch.uint8, device="meta"),
            seq_lens=torch.zeros(requests, dtype=torch.int32),
            gather_lens=None,
            block_table=torch.zeros(requests, 4, dtype=torch.int32),
            block_size=64,
            offset=0,
        )
        return kernel.grid

    return gather


# By hand. An RTX PRO 6000 holds 12 programs of four warps on each of 188 multiprocessors: 2,256.
@pytest.mark.parametrize(
    ("requests", "tokens", "programs"),
    [(1, 37_000, 2256), (4, 262_144, 2256), (1, 8_000, 1000), (2, 1_024, 128), (1, 500, 128)],
)
def test_a_gpu_is_filled_and_a_program_has_something_to_do(
    choose, grid, requests, tokens, programs
):
    choose((12, 0), None)
    assert grid(requests, tokens) == (requests, programs)


@pytest.mark.parametrize("override", [None, "none", "mhc"])
def test_elsewhere_the_programs_are_upstreams(choose, grid, override):
    choose((9, 0), override)
    assert grid(1, 37_000) == (1, 128)
