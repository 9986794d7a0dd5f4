"""How many programs gather the keys of a request that is read.

vLLM's Triton kernel takes a token after the other, each in about 4 us, most of it waiting for
memory, and gives a request 128 programs, fewer than an RTX PRO 6000 has multiprocessors. In a
prompt of 124,000 tokens the ten calls of a chunk of five layers took 1.7 ms on an H200, where those
of the CuTeDSL kernel, which it replaces on the portable path, take 0.04 (reports/engine).
"""

from __future__ import annotations

import torch

from vllm_sm12x.dispatch import portable_enabled
from vllm_sm12x.lowering import multiprocessors

# Of four warps each, as many as SM12x has room for, with 48 warps a multiprocessor.
PROGRAMS_A_MULTIPROCESSOR = 12
# Below that a program takes longer to begin than to gather.
FEWEST_TOKENS = 8


def gather_workers(out: torch.Tensor, upstreams: int) -> int:
    """Programs of a request; not fewer than upstream's, and those where nothing is portable.

    Args:
        out: What is gathered into, ``[requests, tokens, width]``; its tokens are the most there
            can be.
        upstreams: What upstream gives a request.
    """
    if not portable_enabled("cutedsl"):
        return upstreams
    room = PROGRAMS_A_MULTIPROCESSOR * multiprocessors()
    return max(upstreams, min(room, out.shape[1] // FEWEST_TOKENS))
