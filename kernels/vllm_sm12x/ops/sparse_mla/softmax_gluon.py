"""What the Gluon kernels of decode and prefill share: the running softmax over tiles of keys.

Scores are in units of log2, with the heads along the last axis.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Binary digits by which the largest score may exceed what exponents are taken from.
_SLACK = gl.constexpr(8.0)


@gluon.jit
def middle(x):
    """``[n]`` as ``[1, n, 1]``."""
    return gl.expand_dims(gl.expand_dims(x, 0), 2)


@gluon.jit
def _any_of_warp(flags, WARPS: gl.constexpr):
    """int32 ``[WARPS]``: whether one of a warp's heads, 8 and 8 of ``[H]``, has its flag set."""
    flags = gl.reshape(flags.to(gl.int32), [flags.shape[0] // (8 * WARPS), WARPS, 8])
    return gl.max(gl.max(flags, 2), 0)


@gluon.jit
def weigh(scores, largest, total, weights, shrinks, grown_warps):
    """Weights of a tile's keys, into shared memory.

    What the exponents are taken from follows the largest score only when that has left it far
    behind: until then nothing is scaled. Weights stay below ``2 ** _SLACK``.

    Args:
        scores: float32 ``[n, H]``; ``-inf`` where there is no key.
        largest: float32 ``[H]``: what the exponents are taken from; ``-inf`` before the first key.
        total: float32 ``[H]``: sum of the weights before. Or ``[n, H]``, where there are registers
            for it: a sum for each row of a tile, to be added up at the end, which spares the
            shuffles between threads in every round.
        weights: bfloat16 ``[PARTS, n, H]`` in shared memory: the weights, for each part alike.
        shrinks: float32 ``[H]`` in shared memory: by what to scale sums made before.
        grown_warps: int32 in shared memory, one for each warp with heads of its own: whether one of
            them is to be scaled.

    Returns:
        ``largest`` and ``total`` with this tile.
    """
    now_largest = gl.maximum(largest, gl.max(scores, 0))
    grown = now_largest > largest + _SLACK
    now_largest = gl.where(grown, now_largest, largest)
    # Before the first key, exp2(-inf - 0) is 0 where exp2(-inf - -inf) would be NaN.
    base = gl.where(now_largest == float("-inf"), 0.0, now_largest)
    shrink = gl.exp2(largest - base)
    weight = gl.exp2(scores - gl.expand_dims(base, 0))
    if len(total.shape) == 2:
        total = total * gl.expand_dims(shrink, 0) + weight
    else:
        total = total * shrink + gl.sum(weight, 0)
    weight = gl.expand_dims(weight.to(gl.bfloat16), 0)
    weights.store(weight.broadcast_to(weights.shape))
    shrinks.store(shrink)
    grown_warps.store(_any_of_warp(grown, grown_warps.shape[0]))
    return now_largest, total
