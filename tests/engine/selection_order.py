"""The indexer's entries, always in the same order, for comparisons that must be exact.

Upstream's top-k kernels select the same entries each time, and write them in the order in which
threads come to a counter. Attention adds up in that order, so that two passes of one engine over
the same requests round otherwise as soon as a token has more entries than are selected (2,048
tokens of C4A). Seen on an H200: eleven of twelve calls with the same logits gave another order than
the first, and never another set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LAST = torch.iinfo(torch.int32).max


def in_order(indices: torch.Tensor) -> None:
    """Sort rows of int32 ``[N, k]`` in place: ascending, and at the end -1, which is no entry."""
    ascending = torch.where(indices < 0, _LAST, indices).sort(dim=-1).values
    indices.copy_(torch.where(ascending == _LAST, -1, ascending))


def _then_in_order(select: Callable[..., Any], place: int) -> Callable[..., Any]:
    def selected(*arguments: Any) -> Any:
        result = select(*arguments)
        in_order(arguments[place])
        return result

    return selected


def install() -> None:
    """Sort what vLLM's indexer selects in this process, in prefill and in decode."""
    from vllm import _custom_ops

    for name in ("top_k_per_row_prefill", "top_k_per_row_decode"):
        setattr(_custom_ops, name, _then_in_order(getattr(_custom_ops, name), 3))
    torch.ops._C.persistent_topk = _then_in_order(torch.ops._C.persistent_topk, 2)
