"""What the compile gate compiles of this operation; see :mod:`vllm_sm12x.proof.case`."""

from __future__ import annotations

from vllm_sm12x.ops.mhc.config import FINISH_TABLE, MIX_TABLE, POST_TABLE
from vllm_sm12x.ops.mhc.kernel import finish_kernel, halve_kernel, mix_kernel, post_kernel
from vllm_sm12x.ops.mhc.launch import HALVE_BLOCK, HALVE_WARPS
from vllm_sm12x.proof.case import CompileCase, case_of_row, sm12x_rows

TABLES = (MIX_TABLE, FINISH_TABLE, POST_TABLE)

_POINTERS = {
    "x": "*bf16",
    "residual": "*bf16",
    "post": "*fp32",
    "comb": "*fp32",
    "fn": "*fp32",
    "streams": "*bf16",
    "products": "*fp32",
    "squares": "*fp32",
    "parts": "*fp32",
    "scale": "*fp32",
    "base": "*fp32",
    "norm_weight": "*bf16",
    "out": "*bf16",
}
_FLOATS = ("rms_eps", "gate_eps", "sinkhorn_eps", "post_value", "norm_eps")
_TYPES = _POINTERS | dict.fromkeys(_FLOATS, "fp32")
# The squares stand before the products: no multiple of 16 bytes.
_DIVISIBLE_BY_16 = tuple(name for name in _POINTERS if name != "squares")

# DeepSeek V4 Flash's.
_HIDDEN, _STREAMS = 4096, 4
_MIXES, _HEAD = 24, 4

# What each function makes: outputs of the mapping, columns of their tile, what is put back.
_STEPS = {"pre": (_MIXES, 32, False), "fused": (_MIXES, 32, True), "head": (_HEAD, 8, False)}


def cases() -> list[CompileCase]:
    """Every row under an SM12x target, for each of the functions that use it."""
    mix = [
        _mix_case(f"mix {step} tokens={name}", row, *_STEPS[step], _STREAMS)
        for name, row in sm12x_rows(MIX_TABLE)
        for step in _STEPS
    ]
    name, row = sm12x_rows(MIX_TABLE)[0]
    mix.append(_mix_case(f"prenorm tokens={name}", row, _MIXES, 32, False, 1))
    finish = [
        _finish_case(name, row, MIX_TABLE["sm_120"][name].splits, step, normed)
        for name, row in sm12x_rows(FINISH_TABLE)
        for step, normed in (("pre", True), ("pre", False), ("head", False))
    ]
    (post,) = {row for target, row in POST_TABLE.items() if target != "sm_90"}
    flags = {"HIDDEN": _HIDDEN, "BLOCK_H": post.block_h, "OVERLAP": True}
    halve = [_halve_case("halve", _MIXES, 32), _halve_case("halve head", _HEAD, 8)]
    return [*mix, *halve, *finish, _case("post", post_kernel, flags, (), (), post)]


def _mix_case(label, row, outputs, width, has_post, streams) -> CompileCase:
    absent = () if has_post else ("x", "post", "comb", "streams")
    halved = row.halved and streams == _STREAMS
    one_step = streams == _STREAMS and not halved and row.splits * row.block_h == _HIDDEN
    flags = {
        "HIDDEN": _HIDDEN * _STREAMS // streams,
        "STREAMS": streams,
        "OUTPUTS": outputs,
        "BLOCK_OUT": width,
        "BLOCK_T": row.block_t,
        "BLOCK_H": row.block_h,
        "HAS_POST": has_post,
        "EVEN": True,
        "ONE_STEP": one_step,
        "HALVED": halved,
        "OVERLAP": True,
    }
    types = {"fn": "*bf16"} if halved else {}
    instructions = ("HMMA.16816.F32.BF16",)
    return _case(label, mix_kernel, flags, absent, instructions, row, types)


def _finish_case(name, row, splits, step, normed) -> CompileCase:
    outputs, width, _ = _STEPS[step]
    has_mixes = step != "head"
    absent = () if normed else ("norm_weight",)
    absent += () if has_mixes else ("post", "comb")
    flags = {
        "HIDDEN": _HIDDEN,
        "BLOCK_H": _HIDDEN,
        "OUTPUTS": outputs,
        "WIDTH": width,
        "SPLIT_SLOTS": splits,
        "MIX_T": row.mix_t,
        "HAS_MIXES": has_mixes,
        "OVERLAP": True,
    }
    label = f"finish {step} tokens={name}" + (" norm" if normed else "")
    return _case(label, finish_kernel, flags, absent, (), row)


def _halve_case(label, outputs, width) -> CompileCase:
    flags = {
        "COLUMNS": _STREAMS * _HIDDEN,
        "OUTPUTS": outputs,
        "BLOCK_OUT": width,
        "BLOCK_H": HALVE_BLOCK,
        "OVERLAP": True,
    }
    return CompileCase(
        label=label,
        kernel=halve_kernel,
        signature={"fn": "*fp32", "halves": "*bf16"},
        constexprs=flags,
        num_warps=HALVE_WARPS,
        num_stages=1,
        divisible_by_16=("fn", "halves"),
    )


def _case(label, kernel, flags, absent, instructions, row, types=None) -> CompileCase:
    return case_of_row(
        label,
        kernel,
        _TYPES | (types or {}),
        {**flags, **dict.fromkeys(absent)},
        row,
        instructions=instructions,
        divisible_by_16=_DIVISIBLE_BY_16,
    )
