"""Hyper-connections in Triton: two launches a step, whatever is fused into it.

The mix kernel makes the new streams where a layer's output is to be put back, and the products of
the streams with the mapping and the squares of the streams, in parts over the columns: a single
token so fills many multiprocessors. Its operands are read once, whatever is made of them.

The mapping is float32. It is multiplied as a sum of two bfloat16 numbers, ``high + low``, which
leaves ``2**-17`` of each factor out; the streams are bfloat16 already. Sums are float32.

The finish kernel adds the parts. Some of its programs make the post weights and the mix matrix,
with Sinkhorn's iteration in registers, while the others make a token's layer input each, from the
gates alone.

A kernel starts while the one before it ends (programmatic dependent launch), and waits for it
before it touches memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_STREAMS = tl.constexpr(4)

# These change from call to call: a kernel for each of their kinds would be compiled while serving.
_VARIABLE = [
    "tokens",
    "columns",
    "splits",
    "rounds",
    "product_split",
    "product_token",
    "square_split",
    "square_token",
]


@triton.jit
def _begin(OVERLAP: tl.constexpr):
    """Wait for the kernel before this one; let the one after it start."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _load_weights(post, comb, token, STREAM: tl.constexpr):
    """Weights of new stream ``STREAM``: the layer's output's, then the four old streams'.

    ``post`` and ``comb`` point to the weights of token 0.
    """
    weights = comb + token * (_STREAMS * _STREAMS) + STREAM
    return (
        tl.load(post + token * _STREAMS + STREAM),
        tl.load(weights),
        tl.load(weights + _STREAMS),
        tl.load(weights + 2 * _STREAMS),
        tl.load(weights + 3 * _STREAMS),
    )


@triton.jit
def _put_back(x, s0, s1, s2, s3, weights):
    """A new stream in bfloat16, from what :func:`_load_weights` gives for it."""
    new = weights[0] * x + weights[1] * s0 + weights[2] * s1 + weights[3] * s2 + weights[4] * s3
    return new.to(tl.bfloat16)


@triton.jit
def _keep_layout(values):
    """bfloat16 ``values`` themselves.

    The compiler would otherwise make operands in the layout of the matrix instruction: new streams
    a second time, beside those that are stored, and the mapping's parts once a warp. It moves no
    computation past this instruction.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [values], dtype=tl.bfloat16, is_pure=False, pack=2
    )


@triton.jit
def _multiply(streams, place, inside, acc):
    """``acc + streams @ mapping.T`` for bfloat16 ``streams`` and the float32 mapping at ``place``.

    ``place`` is ``[outputs, columns]``.
    """
    mapping = tl.load(place, mask=inside, other=0.0)
    # The nearest number whose lower 16 bits are 0 is one of bfloat16.
    bits = mapping.to(tl.int32, bitcast=True) + 0x8000
    high = (bits & -0x10000).to(tl.float32, bitcast=True)
    low = _keep_layout((mapping - high).to(tl.bfloat16))
    acc = tl.dot(streams, tl.trans(_keep_layout(high.to(tl.bfloat16))), acc)
    return tl.dot(streams, tl.trans(low), acc)


@triton.jit(do_not_specialize=_VARIABLE)
def mix_kernel(
    x,
    residual,
    post,
    comb,
    fn,
    streams,
    products,
    product_split,
    product_token,
    squares,
    square_split,
    square_token,
    tokens,
    columns,
    HIDDEN: tl.constexpr,
    STREAMS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_POST: tl.constexpr,
    EVEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Products of ``BLOCK_T`` tokens' streams with the mapping over one part of the columns.

    Grid: tiles of tokens, parts. What has no strides is contiguous.

    Args:
        x: bfloat16 ``[tokens, HIDDEN]``, the layer's output, with ``HAS_POST``.
        residual: bfloat16 ``[tokens, STREAMS, HIDDEN]``.
        post: float32 ``[tokens, 4]``, with ``HAS_POST``.
        comb: float32 ``[tokens, 4, 4]``, with ``HAS_POST``.
        fn: float32 ``[OUTPUTS, STREAMS * HIDDEN]``.
        streams: bfloat16 as ``residual``: the new streams, written with ``HAS_POST``.
        products: float32 ``[parts, tokens, OUTPUTS]``, columns are neighbours; written.
        squares: float32 ``[parts, tokens]``; written.
        columns: Columns a part, of each stream.
        EVEN: Every part is a whole number of steps, and there is no column beyond ``HIDDEN``.
    """
    _begin(OVERLAP)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    in_tokens = token < tokens
    # Lanes that are masked off get an address inside too.
    token = tl.where(in_tokens, token, 0).to(tl.int64)
    output = tl.arange(0, BLOCK_OUT)
    in_outputs = output < OUTPUTS
    mapping_row = tl.where(in_outputs, output, 0) * (STREAMS * HIDDEN)

    if HAS_POST:
        row = token[:, None]
        weights = (
            _load_weights(post, comb, row, 0),
            _load_weights(post, comb, row, 1),
            _load_weights(post, comb, row, 2),
            _load_weights(post, comb, row, 3),
        )
    acc = tl.zeros([BLOCK_T, BLOCK_OUT], tl.float32)
    square = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    steps = tl.cdiv(columns, BLOCK_H)
    for step in range(0, steps):
        if EVEN:
            # A multiple of the step, as the compiler can see, so that loads are wide.
            column = (split * steps + step) * BLOCK_H + tl.arange(0, BLOCK_H)
        else:
            column = split * columns + step * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = in_tokens[:, None]
        in_mapping = in_outputs[:, None]
        if not EVEN:
            in_columns = column < tl.minimum((split + 1) * columns, HIDDEN)
            column = tl.where(in_columns, column, 0)
            inside = inside & in_columns[None, :]
            in_mapping = in_mapping & in_columns[None, :]
        place = token[:, None] * (STREAMS * HIDDEN) + column[None, :]
        mapping = fn + mapping_row[:, None] + column[None, :]
        if HAS_POST:
            output_of_layer = tl.load(x + row * HIDDEN + column[None, :], inside, other=0.0)
            output_of_layer = output_of_layer.to(tl.float32)
            s0 = tl.load(residual + place, inside, other=0.0).to(tl.float32)
            s1 = tl.load(residual + place + HIDDEN, inside, other=0.0).to(tl.float32)
            s2 = tl.load(residual + place + 2 * HIDDEN, inside, other=0.0).to(tl.float32)
            s3 = tl.load(residual + place + 3 * HIDDEN, inside, other=0.0).to(tl.float32)
            for stream in tl.static_range(STREAMS):
                new = _put_back(output_of_layer, s0, s1, s2, s3, weights[stream])
                new = _keep_layout(new)
                tl.store(streams + place + stream * HIDDEN, new, mask=inside)
                # Lanes beyond the columns hold zeros: all their factors are zeros.
                square += new.to(tl.float32) * new.to(tl.float32)
                acc = _multiply(new, mapping + stream * HIDDEN, in_mapping, acc)
        else:
            for stream in tl.static_range(STREAMS):
                values = tl.load(residual + place + stream * HIDDEN, inside, other=0.0)
                square += values.to(tl.float32) * values.to(tl.float32)
                acc = _multiply(values, mapping + stream * HIDDEN, in_mapping, acc)

    tl.store(
        products + split * product_split + token[:, None] * product_token + output[None, :],
        acc,
        mask=in_tokens[:, None] & in_outputs[None, :],
    )
    tl.store(
        squares + split * square_split + token * square_token, tl.sum(square, 1), mask=in_tokens
    )


@triton.jit
def _column(values, number):
    """Column ``number`` of ``[n, columns]``."""
    here = tl.arange(0, values.shape[1])[None, :] == number
    return tl.sum(tl.where(here, values, 0.0), 1)


@triton.jit
def _load_mix(
    parts, token, splits, rms_eps, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr,
    SPLIT_SLOTS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """RMS-normalised products of some tokens, float32 ``[n, BLOCK_OUT]``."""
    split = tl.arange(0, SPLIT_SLOTS)
    in_splits = split < splits
    row = token[:, None] * splits + tl.where(in_splits, split, 0)[None, :]
    output = tl.arange(0, BLOCK_OUT)
    # Columns behind the squares hold anything. No one looks at them, and loads stay wide.
    place = parts + row[:, :, None] * BLOCK_OUT + output[None, None, :]
    sums = tl.sum(tl.load(place, mask=in_splits[None, :, None], other=0.0), 1)
    # The sum of the squares stands behind the products.
    mean_square = _column(sums, OUTPUTS) / (_STREAMS * HIDDEN)
    return sums * tl.rsqrt(mean_square + rms_eps)[:, None]


@triton.jit
def _share(a, b, c, d, eps):
    """Each divided by their sum plus eps."""
    # In pairs: the iteration is one long chain of these.
    inverse = 1.0 / (((a + b) + (c + d)) + eps)
    return a * inverse, b * inverse, c * inverse, d * inverse


@triton.jit
def _softmax(a, b, c, d, eps):
    """Softmax of four, plus eps."""
    largest = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = tl.exp(a - largest), tl.exp(b - largest), tl.exp(c - largest), tl.exp(d - largest)
    a, b, c, d = _share(a, b, c, d, 0.0)
    return a + eps, b + eps, c + eps, d + eps


@triton.jit
def _store_row(place, a, b, c, d, mask):
    tl.store(place, a, mask=mask)
    tl.store(place + 1, b, mask=mask)
    tl.store(place + 2, c, mask=mask)
    tl.store(place + 3, d, mask=mask)


@triton.jit
def _load_base(base, OUTPUTS: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """``[1, BLOCK_OUT]``."""
    output = tl.arange(0, BLOCK_OUT)
    return tl.load(base + tl.where(output < OUTPUTS, output, 0))[None, :]


@triton.jit
def _make_input(
    token,
    parts,
    scale,
    base,
    streams,
    norm_weight,
    out,
    splits,
    rms_eps,
    gate_eps,
    norm_eps,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    SPLIT_SLOTS: tl.constexpr,
):
    """The layer's input of one token."""
    column = tl.arange(0, BLOCK_H)
    inside = column < HIDDEN
    if HIDDEN < BLOCK_H:
        column = tl.where(inside, column, 0)
    place = streams + token * (_STREAMS * HIDDEN) + column
    s0 = tl.load(place, mask=inside, other=0.0)
    s1 = tl.load(place + HIDDEN, mask=inside, other=0.0)
    s2 = tl.load(place + 2 * HIDDEN, mask=inside, other=0.0)
    s3 = tl.load(place + 3 * HIDDEN, mask=inside, other=0.0)
    only = token + tl.zeros([1], tl.int64)
    mix = _load_mix(parts, only, splits, rms_eps, HIDDEN, OUTPUTS, SPLIT_SLOTS, BLOCK_OUT)
    gates = tl.sigmoid(mix * tl.load(scale) + _load_base(base, OUTPUTS, BLOCK_OUT)) + gate_eps
    collapsed = tl.sum(_column(gates, 0), 0) * s0.to(tl.float32)
    collapsed += tl.sum(_column(gates, 1), 0) * s1.to(tl.float32)
    collapsed += tl.sum(_column(gates, 2), 0) * s2.to(tl.float32)
    collapsed += tl.sum(_column(gates, 3), 0) * s3.to(tl.float32)
    if norm_weight is not None:
        mean_square = tl.sum(collapsed * collapsed, 0) / HIDDEN
        weight = tl.load(norm_weight + column).to(tl.float32)
        collapsed = collapsed.to(tl.bfloat16).to(tl.float32)
        collapsed = collapsed * tl.rsqrt(mean_square + norm_eps) * weight
    tl.store(out + token * HIDDEN + column, collapsed.to(tl.bfloat16), mask=inside)


@triton.jit
def _make_mixes(
    first,
    parts,
    scale,
    base,
    post,
    comb,
    tokens,
    splits,
    rounds,
    rms_eps,
    sinkhorn_eps,
    post_value,
    HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    SPLIT_SLOTS: tl.constexpr,
    MIX_T: tl.constexpr,
):
    """Post weights and mix matrices of ``MIX_T`` tokens from ``first`` on."""
    output = tl.arange(0, BLOCK_OUT)
    token = first + tl.arange(0, MIX_T)
    in_tokens = token < tokens
    token = tl.where(in_tokens, token, 0).to(tl.int64)
    mix = _load_mix(parts, token, splits, rms_eps, HIDDEN, OUTPUTS, SPLIT_SLOTS, BLOCK_OUT)
    is_post = output < 2 * _STREAMS
    factor = tl.where(is_post, tl.load(scale + 1), tl.load(scale + 2))
    mix = mix * factor[None, :] + _load_base(base, OUTPUTS, BLOCK_OUT)
    is_post = (output >= _STREAMS) & is_post
    post_column = tl.where(is_post, output - _STREAMS, 0)
    tl.store(
        post + token[:, None] * _STREAMS + post_column[None, :],
        tl.sigmoid(mix) * post_value,
        mask=in_tokens[:, None] & is_post[None, :],
    )
    # The matrix of a token is in registers, so that no sum of the iteration leaves a thread.
    a0, a1, a2, a3 = _column(mix, 8), _column(mix, 9), _column(mix, 10), _column(mix, 11)
    b0, b1, b2, b3 = _column(mix, 12), _column(mix, 13), _column(mix, 14), _column(mix, 15)
    c0, c1, c2, c3 = _column(mix, 16), _column(mix, 17), _column(mix, 18), _column(mix, 19)
    d0, d1, d2, d3 = _column(mix, 20), _column(mix, 21), _column(mix, 22), _column(mix, 23)
    a0, a1, a2, a3 = _softmax(a0, a1, a2, a3, sinkhorn_eps)
    b0, b1, b2, b3 = _softmax(b0, b1, b2, b3, sinkhorn_eps)
    c0, c1, c2, c3 = _softmax(c0, c1, c2, c3, sinkhorn_eps)
    d0, d1, d2, d3 = _softmax(d0, d1, d2, d3, sinkhorn_eps)
    a0, b0, c0, d0 = _share(a0, b0, c0, d0, sinkhorn_eps)
    a1, b1, c1, d1 = _share(a1, b1, c1, d1, sinkhorn_eps)
    a2, b2, c2, d2 = _share(a2, b2, c2, d2, sinkhorn_eps)
    a3, b3, c3, d3 = _share(a3, b3, c3, d3, sinkhorn_eps)
    for _ in range(1, rounds):
        a0, a1, a2, a3 = _share(a0, a1, a2, a3, sinkhorn_eps)
        b0, b1, b2, b3 = _share(b0, b1, b2, b3, sinkhorn_eps)
        c0, c1, c2, c3 = _share(c0, c1, c2, c3, sinkhorn_eps)
        d0, d1, d2, d3 = _share(d0, d1, d2, d3, sinkhorn_eps)
        a0, b0, c0, d0 = _share(a0, b0, c0, d0, sinkhorn_eps)
        a1, b1, c1, d1 = _share(a1, b1, c1, d1, sinkhorn_eps)
        a2, b2, c2, d2 = _share(a2, b2, c2, d2, sinkhorn_eps)
        a3, b3, c3, d3 = _share(a3, b3, c3, d3, sinkhorn_eps)
    matrix = comb + token * (_STREAMS * _STREAMS)
    _store_row(matrix, a0, a1, a2, a3, in_tokens)
    _store_row(matrix + _STREAMS, b0, b1, b2, b3, in_tokens)
    _store_row(matrix + 2 * _STREAMS, c0, c1, c2, c3, in_tokens)
    _store_row(matrix + 3 * _STREAMS, d0, d1, d2, d3, in_tokens)


@triton.jit(do_not_specialize=_VARIABLE)
def finish_kernel(
    parts,
    scale,
    base,
    streams,
    norm_weight,
    post,
    comb,
    out,
    tokens,
    splits,
    rounds,
    rms_eps,
    gate_eps,
    sinkhorn_eps,
    post_value,
    norm_eps,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    SPLIT_SLOTS: tl.constexpr,
    MIX_T: tl.constexpr,
    HAS_MIXES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Post weights and mix matrices of ``MIX_T`` tokens, or the layer's input of one token.

    With ``HAS_MIXES``, ``cdiv(tokens, MIX_T)`` programs for the former come first; ``tokens``
    programs for the latter. All tensors are contiguous.

    Args:
        parts: float32 ``[tokens, splits, BLOCK_OUT]``, ``OUTPUTS`` products and the squares' sum.
        scale: float32 ``[3]``, or ``[1]`` without mixes.
        base: float32 ``[OUTPUTS]``.
        streams: bfloat16 ``[tokens, 4, HIDDEN]``.
        norm_weight: bfloat16 ``[HIDDEN]`` or None: no norm.
        post: float32 ``[tokens, 4]``, written with ``HAS_MIXES``.
        comb: float32 ``[tokens, 4, 4]``, written with ``HAS_MIXES``.
        out: bfloat16 ``[tokens, HIDDEN]``; written.
    """
    _begin(OVERLAP)
    mix_programs = 0
    if HAS_MIXES:
        mix_programs = tl.cdiv(tokens, MIX_T)
    program = tl.program_id(0)
    if program >= mix_programs:
        _make_input(
            (program - mix_programs).to(tl.int64),
            parts,
            scale,
            base,
            streams,
            norm_weight,
            out,
            splits,
            rms_eps,
            gate_eps,
            norm_eps,
            HIDDEN,
            BLOCK_H,
            OUTPUTS,
            BLOCK_OUT,
            SPLIT_SLOTS,
        )
    elif HAS_MIXES:
        _make_mixes(
            program * MIX_T,
            parts,
            scale,
            base,
            post,
            comb,
            tokens,
            splits,
            rounds,
            rms_eps,
            sinkhorn_eps,
            post_value,
            HIDDEN,
            OUTPUTS,
            BLOCK_OUT,
            SPLIT_SLOTS,
            MIX_T,
        )


@triton.jit
def post_kernel(
    x,
    residual,
    post,
    comb,
    streams,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """New streams of one token and ``BLOCK_H`` columns; arguments as in :func:`mix_kernel`.

    Grid: tokens, blocks of columns.
    """
    _begin(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < HIDDEN
    if HIDDEN % BLOCK_H != 0:
        column = tl.where(inside, column, 0)
    place = token * (_STREAMS * HIDDEN) + column
    output_of_layer = tl.load(x + token * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)
    s0 = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(residual + place + HIDDEN, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(residual + place + 2 * HIDDEN, mask=inside, other=0.0).to(tl.float32)
    s3 = tl.load(residual + place + 3 * HIDDEN, mask=inside, other=0.0).to(tl.float32)
    for stream in tl.static_range(_STREAMS):
        weights = _load_weights(post, comb, token, stream)
        new = _put_back(output_of_layer, s0, s1, s2, s3, weights)
        tl.store(streams + place + stream * HIDDEN, new, mask=inside)
