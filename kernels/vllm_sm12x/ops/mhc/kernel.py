"""Hyper-connections in Triton: two launches a step, whatever is fused into it.

The mix kernel makes the new streams where a layer's output is to be put back, and the products of
the streams with the mapping and the squares of the streams, in parts over the columns: a single
token so fills many multiprocessors. Its operands are read once, whatever is made of them.

The mapping is float32. It is multiplied as a sum of two bfloat16 numbers, ``high + low``, which
leaves ``2**-17`` of each factor out; the streams are bfloat16 already. Sums are float32. For many
tokens a kernel before makes the two.

The finish kernel adds the parts. Some of its programs make the post weights and the mix matrix,
with Sinkhorn's iteration in registers, while the others make a token's layer input each, from the
gates alone.

A kernel starts while the one before it ends (programmatic dependent launch). What it reads before
it waits for that one are the model's parameters alone. That is sound: a kernel that has not let its
successor start early is complete before this one starts, and those that do so (these, after they
have waited themselves) write no parameters.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_STREAMS = tl.constexpr(4)

# A row of the parts: the sum of the squares in column 3, the products from column 4 on, so that the
# first 8 columns, two wide loads, are what a layer's input needs.
SQUARES = 3
PRODUCTS = 4
_SQUARES = tl.constexpr(SQUARES)
_PRODUCTS = tl.constexpr(PRODUCTS)
# Columns of the square, what is beside it, and the gates.
_GATE_COLUMNS = tl.constexpr(8)

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
    # Rounded as the definition rounds in PyTorch, the old streams' sum first and then the layer's
    # product. Fused by name, and not where 0 is added: the compiler would otherwise choose, in some
    # kernels so and in others so, and a stream would depend on which kernel made it.
    old = tl.fma(weights[2], s1, weights[1] * s0)
    old = tl.fma(weights[3], s2, old)
    old = tl.fma(weights[4], s3, old)
    return (old + tl.fma(weights[0], x, 0.0)).to(tl.bfloat16)


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
def _halves(mapping):
    """float32 ``values`` as a sum of two in bfloat16."""
    # The nearest number whose lower 16 bits are 0 is one of bfloat16.
    bits = mapping.to(tl.int32, bitcast=True) + 0x8000
    high = (bits & -0x10000).to(tl.float32, bitcast=True)
    low = _keep_layout((mapping - high).to(tl.bfloat16))
    return _keep_layout(high.to(tl.bfloat16)), low


@triton.jit
def _multiply(streams, mapping, acc):
    """``acc + streams @ mapping.T`` for bfloat16 ``streams`` and what :func:`_halves` gives."""
    acc = tl.dot(streams, tl.trans(mapping[0]), acc)
    return tl.dot(streams, tl.trans(mapping[1]), acc)


@triton.jit
def halve_kernel(
    fn,
    halves,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Once a call what the mix kernel otherwise does for every tile of tokens.

    Grid: blocks of columns.

    Args:
        fn: float32 ``[OUTPUTS, COLUMNS]``.
        halves: bfloat16 ``[2, BLOCK_OUT, COLUMNS]``; written, zeros beyond ``OUTPUTS``.
    """
    output = tl.arange(0, BLOCK_OUT)[:, None]
    column = (tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    inside = (output < OUTPUTS) & (column < COLUMNS)
    values = tl.load(fn + output * COLUMNS + column, mask=inside, other=0.0)
    _begin(OVERLAP)
    high, low = _halves(values)
    place = halves + output * COLUMNS + column
    tl.store(place, high, mask=column < COLUMNS)
    tl.store(place + BLOCK_OUT * COLUMNS, low, mask=column < COLUMNS)


@triton.jit
def _load_factors(fn, place, inside, HALVED: tl.constexpr, HALF: tl.constexpr):
    """The mapping at ``place`` as :func:`_halves` gives it; ``HALF``: numbers of either half."""
    if HALVED:
        # Rows beyond the outputs are zeros in memory.
        factors = tl.load(fn + place), tl.load(fn + HALF + place)
    else:
        factors = _halves(tl.load(fn + place, mask=inside, other=0.0))
    return factors


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
    ONE_STEP: tl.constexpr,
    HALVED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Products of ``BLOCK_T`` tokens' streams with the mapping over one part of the columns.

    Grid: parts, tiles of tokens. What has no strides is contiguous.

    Args:
        x: bfloat16 ``[tokens, HIDDEN]``, the layer's output, with ``HAS_POST``.
        residual: bfloat16 ``[tokens, STREAMS, HIDDEN]``.
        post: float32 ``[tokens, 4]``, with ``HAS_POST``.
        comb: float32 ``[tokens, 4, 4]``, with ``HAS_POST``.
        fn: float32 ``[OUTPUTS, STREAMS * HIDDEN]``, or what :func:`halve_kernel` gives for it.
        streams: bfloat16 as ``residual``: the new streams, written with ``HAS_POST``.
        products: float32 ``[parts, tokens, OUTPUTS]``, columns are neighbours; written.
        squares: float32 ``[parts, tokens]``; written.
        columns: Columns a part, of each stream.
        EVEN: Every part is a whole number of steps, and there is no column beyond ``HIDDEN``.
        ONE_STEP: With ``EVEN``, every part is a single step, and not ``HALVED``.
        HALVED: ``fn`` is in halves; with ``EVEN`` alone.
    """
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(0)
    in_tokens = token < tokens
    # Lanes that are masked off get an address inside too.
    token = tl.where(in_tokens, token, 0).to(tl.int64)
    output = tl.arange(0, BLOCK_OUT)
    in_outputs = output < OUTPUTS
    mapping_row = output if HALVED else tl.where(in_outputs, output, 0)
    mapping_row = mapping_row * (STREAMS * HIDDEN)

    if ONE_STEP:
        # The whole mapping at once and before the wait. Between the streams' products, each of its
        # loads would be a trip to memory of its own.
        first = split * BLOCK_H + tl.arange(0, BLOCK_H)
        all_mapping = fn + mapping_row[:, None] + first[None, :]
        mappings = ()
        for number in tl.static_range(STREAMS):
            part = tl.load(all_mapping + number * HIDDEN, in_outputs[:, None], other=0.0)
            mappings = mappings + (part,)
    _begin(OVERLAP)
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
    TOGETHER: tl.constexpr = ONE_STEP or HALVED
    half: tl.constexpr = BLOCK_OUT * STREAMS * HIDDEN
    steps = 1 if ONE_STEP else tl.cdiv(columns, BLOCK_H)
    for step in range(0, steps):
        if EVEN and STREAMS > 1:
            # Parts take turns, so that those at work together read and write neighbours. A multiple
            # of the step, as the compiler can see, so that loads are wide.
            column = (step * tl.num_programs(0) + split) * BLOCK_H + tl.arange(0, BLOCK_H)
        elif EVEN:
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
        mapping = mapping_row[:, None] + column[None, :]
        news = ()
        if HAS_POST:
            output_of_layer = tl.load(x + row * HIDDEN + column[None, :], inside, other=0.0)
            output_of_layer = output_of_layer.to(tl.float32)
            s0 = tl.load(residual + place, inside, other=0.0).to(tl.float32)
            s1 = tl.load(residual + place + HIDDEN, inside, other=0.0).to(tl.float32)
            s2 = tl.load(residual + place + 2 * HIDDEN, inside, other=0.0).to(tl.float32)
            s3 = tl.load(residual + place + 3 * HIDDEN, inside, other=0.0).to(tl.float32)
            if ONE_STEP:
                # The assembler would let some of these loads wait for the others, for registers.
                tl.debug_barrier()
            for stream in tl.static_range(STREAMS):
                new = _put_back(output_of_layer, s0, s1, s2, s3, weights[stream])
                new = _keep_layout(new)
                tl.store(streams + place + stream * HIDDEN, new, mask=inside)
                # Lanes beyond the columns hold zeros: all their factors are zeros.
                square += new.to(tl.float32) * new.to(tl.float32)
                if TOGETHER:
                    news = news + (new,)
                else:
                    factors = _load_factors(fn, mapping + stream * HIDDEN, in_mapping, HALVED, half)
                    acc = _multiply(new, factors, acc)
        else:
            for stream in tl.static_range(STREAMS):
                values = tl.load(residual + place + stream * HIDDEN, inside, other=0.0)
                square += values.to(tl.float32) * values.to(tl.float32)
                if TOGETHER:
                    news = news + (values,)
                else:
                    factors = _load_factors(fn, mapping + stream * HIDDEN, in_mapping, HALVED, half)
                    acc = _multiply(values, factors, acc)
        if TOGETHER:
            # All operands, then all products: they wait for each other once, not once a stream.
            operands = ()
            if ONE_STEP:
                for stream in tl.static_range(STREAMS):
                    operands = operands + (_halves(mappings[stream]),)
            for stream in tl.static_range(STREAMS):
                if ONE_STEP:
                    factors = operands[stream]
                else:
                    # In shared memory already; all at once would take 128 registers.
                    factors = _load_factors(fn, mapping + stream * HIDDEN, in_mapping, HALVED, half)
                acc = _multiply(news[stream], factors, acc)

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
    parts, token, splits, rms_eps, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, SPLIT_SLOTS: tl.constexpr,
):  # fmt: skip
    """RMS-normalised products of some tokens, float32 ``[n, COLUMNS]``: a row's first columns."""
    split = tl.arange(0, SPLIT_SLOTS)
    in_splits = split < splits
    row = token[:, None] * splits + tl.where(in_splits, split, 0)[None, :]
    column = tl.arange(0, COLUMNS)
    # Columns that nothing is written to hold anything. No one looks at them, and loads stay wide.
    place = parts + row[:, :, None] * WIDTH + column[None, None, :]
    sums = tl.sum(tl.load(place, mask=in_splits[None, :, None], other=0.0), 1)
    mean_square = _column(sums, _SQUARES) / (_STREAMS * HIDDEN)
    return sums * tl.rsqrt(mean_square + rms_eps)[:, None]


@triton.jit
def _inverse(values):
    """``1 / values`` within 1 ulp, with one instruction: division scales its operands as well."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _softmax(a, b, c, d, eps):
    """Softmax of four, plus eps."""
    largest = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = tl.exp(a - largest), tl.exp(b - largest), tl.exp(c - largest), tl.exp(d - largest)
    inverse = _inverse((a + b) + (c + d))
    return a * inverse + eps, b * inverse + eps, c * inverse + eps, d * inverse + eps


@triton.jit
def _divisor(a, b, c, d, factors, last, eps):
    """The sum of four, times ``factors``, plus ``eps * last``; in pairs, for a shorter chain."""
    first = tl.fma(b, factors[1], tl.fma(a, factors[0], eps * last))
    return first + tl.fma(d, factors[3], c * factors[2])


@triton.jit
def _inverses(values):
    return (_inverse(values[0]), _inverse(values[1]), _inverse(values[2]), _inverse(values[3]))


@triton.jit
def _store_scaled(place, a, b, c, d, row, columns, mask):
    """A row of a mix matrix, from the row before the iteration and the factors that it gave."""
    tl.store(place, (a * row) * columns[0], mask=mask)
    tl.store(place + 1, (b * row) * columns[1], mask=mask)
    tl.store(place + 2, (c * row) * columns[2], mask=mask)
    tl.store(place + 3, (d * row) * columns[3], mask=mask)


@triton.jit
def _load_base(base, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of the products in a row's first columns: ``[1, COLUMNS]``."""
    output = tl.arange(0, COLUMNS) - _PRODUCTS
    return tl.load(base + tl.where((output >= 0) & (output < OUTPUTS), output, 0))[None, :]


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
    WIDTH: tl.constexpr,
    SPLIT_SLOTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The layer's input of one token."""
    column = tl.arange(0, BLOCK_H)
    inside = column < HIDDEN
    if HIDDEN < BLOCK_H:
        column = tl.where(inside, column, 0)
    gate_scale = tl.load(scale)
    gate_base = _load_base(base, OUTPUTS, _GATE_COLUMNS)
    if norm_weight is not None:
        weight = tl.load(norm_weight + column)
    _begin(OVERLAP)
    place = streams + token * (_STREAMS * HIDDEN) + column
    s0 = tl.load(place, mask=inside, other=0.0)
    s1 = tl.load(place + HIDDEN, mask=inside, other=0.0)
    s2 = tl.load(place + 2 * HIDDEN, mask=inside, other=0.0)
    s3 = tl.load(place + 3 * HIDDEN, mask=inside, other=0.0)
    # The assembler would let these loads wait until the parts are there.
    tl.debug_barrier()
    only = token + tl.zeros([1], tl.int64)
    mix = _load_mix(parts, only, splits, rms_eps, HIDDEN, WIDTH, _GATE_COLUMNS, SPLIT_SLOTS)
    gates = tl.sigmoid(mix * gate_scale + gate_base) + gate_eps
    collapsed = tl.sum(_column(gates, _PRODUCTS), 0) * s0.to(tl.float32)
    collapsed += tl.sum(_column(gates, _PRODUCTS + 1), 0) * s1.to(tl.float32)
    collapsed += tl.sum(_column(gates, _PRODUCTS + 2), 0) * s2.to(tl.float32)
    collapsed += tl.sum(_column(gates, _PRODUCTS + 3), 0) * s3.to(tl.float32)
    if norm_weight is not None:
        mean_square = tl.sum(collapsed * collapsed, 0) / HIDDEN
        collapsed = collapsed.to(tl.bfloat16).to(tl.float32)
        collapsed = collapsed * tl.rsqrt(mean_square + norm_eps) * weight.to(tl.float32)
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
    WIDTH: tl.constexpr,
    SPLIT_SLOTS: tl.constexpr,
    MIX_T: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Post weights and mix matrices of ``MIX_T`` tokens from ``first`` on.

    The iteration divides rows and columns of a matrix ``K`` in turn by their sum plus eps. After
    any number of steps the matrix is ``r[i] * K[i, j] * c[j]``, and a step makes the factors of one
    side anew. Of the rows: ``r[i] * K[i, j] * c[j] / (r[i] * s[i] + eps)``, where ``s[i]`` is the
    sum of ``K[i, j] * c[j]``; so the new factor is the inverse of ``s[i] + eps / r[i]``, and
    ``1 / r[i]`` is what the last factor was the inverse of.
    """
    column = tl.arange(0, WIDTH)
    token = first + tl.arange(0, MIX_T)
    in_tokens = token < tokens
    token = tl.where(in_tokens, token, 0).to(tl.int64)
    is_post = column < _PRODUCTS + 2 * _STREAMS
    factor = tl.where(is_post, tl.load(scale + 1), tl.load(scale + 2))
    mix_base = _load_base(base, OUTPUTS, WIDTH)
    _begin(OVERLAP)
    mix = _load_mix(parts, token, splits, rms_eps, HIDDEN, WIDTH, WIDTH, SPLIT_SLOTS)
    mix = mix * factor[None, :] + mix_base
    is_post = (column >= _PRODUCTS + _STREAMS) & is_post
    post_column = tl.where(is_post, column - _PRODUCTS - _STREAMS, 0)
    tl.store(
        post + token[:, None] * _STREAMS + post_column[None, :],
        tl.sigmoid(mix) * post_value,
        mask=in_tokens[:, None] & is_post[None, :],
    )
    # The matrix of a token is in registers, so that no sum of the iteration leaves a thread.
    k: tl.constexpr = _PRODUCTS + 2 * _STREAMS
    a0, a1, a2, a3 = _column(mix, k), _column(mix, k + 1), _column(mix, k + 2), _column(mix, k + 3)
    b0, b1, b2, b3 = (
        _column(mix, k + 4), _column(mix, k + 5), _column(mix, k + 6), _column(mix, k + 7)
    )  # fmt: skip
    c0, c1, c2, c3 = (
        _column(mix, k + 8), _column(mix, k + 9), _column(mix, k + 10), _column(mix, k + 11)
    )  # fmt: skip
    d0, d1, d2, d3 = (
        _column(mix, k + 12), _column(mix, k + 13), _column(mix, k + 14), _column(mix, k + 15)
    )  # fmt: skip
    a0, a1, a2, a3 = _softmax(a0, a1, a2, a3, sinkhorn_eps)
    b0, b1, b2, b3 = _softmax(b0, b1, b2, b3, sinkhorn_eps)
    c0, c1, c2, c3 = _softmax(c0, c1, c2, c3, sinkhorn_eps)
    d0, d1, d2, d3 = _softmax(d0, d1, d2, d3, sinkhorn_eps)
    one = tl.full([MIX_T], 1.0, tl.float32)
    rows = (one, one, one, one)
    row_divisors = rows
    divisors = (
        _divisor(a0, b0, c0, d0, rows, one, sinkhorn_eps),
        _divisor(a1, b1, c1, d1, rows, one, sinkhorn_eps),
        _divisor(a2, b2, c2, d2, rows, one, sinkhorn_eps),
        _divisor(a3, b3, c3, d3, rows, one, sinkhorn_eps),
    )
    columns = _inverses(divisors)
    for _ in range(1, rounds):
        row_divisors = (
            _divisor(a0, a1, a2, a3, columns, row_divisors[0], sinkhorn_eps),
            _divisor(b0, b1, b2, b3, columns, row_divisors[1], sinkhorn_eps),
            _divisor(c0, c1, c2, c3, columns, row_divisors[2], sinkhorn_eps),
            _divisor(d0, d1, d2, d3, columns, row_divisors[3], sinkhorn_eps),
        )
        rows = _inverses(row_divisors)
        divisors = (
            _divisor(a0, b0, c0, d0, rows, divisors[0], sinkhorn_eps),
            _divisor(a1, b1, c1, d1, rows, divisors[1], sinkhorn_eps),
            _divisor(a2, b2, c2, d2, rows, divisors[2], sinkhorn_eps),
            _divisor(a3, b3, c3, d3, rows, divisors[3], sinkhorn_eps),
        )
        columns = _inverses(divisors)
    matrix = comb + token * (_STREAMS * _STREAMS)
    _store_scaled(matrix, a0, a1, a2, a3, rows[0], columns, in_tokens)
    _store_scaled(matrix + _STREAMS, b0, b1, b2, b3, rows[1], columns, in_tokens)
    _store_scaled(matrix + 2 * _STREAMS, c0, c1, c2, c3, rows[2], columns, in_tokens)
    _store_scaled(matrix + 3 * _STREAMS, d0, d1, d2, d3, rows[3], columns, in_tokens)


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
    WIDTH: tl.constexpr,
    SPLIT_SLOTS: tl.constexpr,
    MIX_T: tl.constexpr,
    HAS_MIXES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Post weights and mix matrices of ``MIX_T`` tokens, or the layer's input of one token.

    With ``HAS_MIXES``, ``cdiv(tokens, MIX_T)`` programs for the former come first; ``tokens``
    programs for the latter. All tensors are contiguous.

    Args:
        parts: float32 ``[tokens, splits, WIDTH]``, the sums of the squares in column ``SQUARES``
            and ``OUTPUTS`` products from column ``PRODUCTS`` on.
        scale: float32 ``[3]``, or ``[1]`` without mixes.
        base: float32 ``[OUTPUTS]``.
        streams: bfloat16 ``[tokens, 4, HIDDEN]``.
        norm_weight: bfloat16 ``[HIDDEN]`` or None: no norm.
        post: float32 ``[tokens, 4]``, written with ``HAS_MIXES``.
        comb: float32 ``[tokens, 4, 4]``, written with ``HAS_MIXES``.
        out: bfloat16 ``[tokens, HIDDEN]``; written.
    """
    mix_programs = 0
    if HAS_MIXES:
        mix_programs = tl.cdiv(tokens, MIX_T)
    program = tl.program_id(0)
    if program >= mix_programs:
        _make_input(
            # The last token first: its streams are the likeliest to be in the cache still.
            (tokens - 1 - (program - mix_programs)).to(tl.int64),
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
            WIDTH,
            SPLIT_SLOTS,
            OVERLAP,
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
            WIDTH,
            SPLIT_SLOTS,
            MIX_T,
            OVERLAP,
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
