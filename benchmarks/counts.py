"""What our kernels execute on SM12x, counted on an emulator: no GPU is needed, no time is measured.

One row a kernel of a call, of ours or of those that ours replace (Marlin, TileLang), all figures a
program (a block of threads):

``ptx``      instructions of PTX that its warps execute; the assembler makes fewer of most
``matrix``   matrix instructions among them
``barriers`` that a warp comes to
``shared``   wavefronts of shared memory, and ``x``, how many times the least for as many bytes
``global``   sectors of 32 bytes that accesses of global memory touch, and ``x`` as before

Each says how many clocks of a multiprocessor they keep busy at least: four instructions a clock, a
matrix instruction of bfloat16 or e4m3 a quarter of it for 16 clocks (RTX PRO 6000: 0.5 and 1.0
PFLOP/s), a wavefront a clock. The largest of ``ptx/4``, ``matrix*4`` and ``shared`` is ``bound``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

from benchmarks.harness import Report, argument_parser

# The emulator and the inputs are the tests'.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))

from compressor_checks import prefill as compressor_case
from emulated_gpu import emulated_gpu
from emulator.driver import Launched
from marlin import marlin_experts
from native_kernels import EmulatedStream
from test_compressor import C128A
from test_fp8_einsum import draw as einsum_arguments
from test_mhc import fused_arguments
from test_mqa_logits import arguments as logits_arguments
from test_mxfp4_experts import draw as experts_arguments
from test_sparse_mla import SCALE, Decode, Prefill
from tilelang_kernels import emulated_tilelang

from vllm_sm12x.ops import mhc, mqa_logits, mxfp4_experts, sparse_mla
from vllm_sm12x.ops.compressor import compress_to_cache
from vllm_sm12x.ops.fp8_einsum import fp8_einsum_bhr_hdr

KERNELS = dict(implementation="triton")
_MATRIX_CLOCKS = 16
_QUARTERS = 4


def calls() -> Iterator[tuple[str, str, Callable[[], list[Launched] | None]]]:
    """Operation, shape and a call of it, which draws its arguments itself.

    One that is not ours gives what it launched.
    """
    for tokens in (1, 12):
        shape = f"{tokens} tokens, 64 heads, 128 + 512 keys"
        yield "sparse_mla_decode", shape, partial(_decode, tokens)
    yield "sparse_mla_prefill", "2 tokens, 64 heads, 640 keys", _prefill
    yield "mqa_logits", "16 tokens, 256 keys, 64 heads", _logits
    for tokens in (1, 24, 128):
        yield "fp8_einsum", f"{tokens} tokens, 2 x 1024 x 512", partial(_einsum, tokens)
    for tokens in (1, 24):
        shape = f"{tokens} tokens, hidden 4096"
        yield "mhc", shape, partial(_mhc, tokens)
        yield "mhc", f"{shape}, TileLang", partial(_tilelang, tokens)
    for tokens in (1, 24, 132):
        shape = f"{tokens} tokens, 24 experts, 512 x 512"
        yield "mxfp4_experts", shape, partial(_experts, tokens)
        yield "mxfp4_experts", f"{shape}, Marlin", partial(_marlin, tokens)
    yield "compressor", "256 tokens, window 128", _compressor


def _decode(tokens: int) -> None:
    more = dict(extra_lens=[512] * tokens, extra_width=512, extra_block_size=64)
    case = Decode([128] * tokens, 128, heads=64, **more)
    first, second = ((pages.cache, indices, lens) for pages, indices, lens in case.sets)
    sparse_mla.sparse_mla_decode(
        case.q, *first, case.sink, SCALE, case.out, *second, lse=case.lse, **KERNELS
    )


def _prefill() -> None:
    case = Prefill([640, 640], 640, heads=64)
    arguments = (case.q, case.kv, case.indices, case.lens, case.sink, SCALE, case.out)
    sparse_mla.sparse_mla_prefill(*arguments, lse=case.lse, **KERNELS)


def _logits() -> None:
    given = logits_arguments(m=16, heads=64, n=256, ranges=[(0, 256)] * 16)
    mqa_logits.fp8_mqa_logits(**given, clean_logits=False, **KERNELS)


def _einsum(tokens: int) -> None:
    fp8_einsum_bhr_hdr(*einsum_arguments(tokens, 2, 1024, 512), **KERNELS)


def _mhc(tokens: int) -> None:
    mhc.mhc_fused_post_pre(**fused_arguments(tokens, 4096, seed=0), **KERNELS)


def _tilelang(tokens: int) -> list[Launched]:
    import vllm.utils.deep_gemm
    from vllm.model_executor.kernels.mhc import tilelang

    stream = EmulatedStream(traffic=True)
    with (
        emulated_tilelang(stream),
        # As on SM12x.
        patch.object(vllm.utils.deep_gemm, "is_deep_gemm_supported", lambda: False),
        patch.object(tilelang, "portable_enabled", lambda operation: False),
    ):
        tilelang.mhc_fused_post_pre_tilelang(**fused_arguments(tokens, 4096, seed=0))
    return stream.launched


# So many that few tokens share one, as of the published model's 256.
EXPERTS = dict(experts=24, hidden=512, intermediate=512, top_k=2)


def _experts(tokens: int) -> None:
    given = experts_arguments(tokens, **EXPERTS)
    mxfp4_experts.mxfp4_experts(*given, swiglu_limit=10.0, **KERNELS)


def _marlin(tokens: int) -> list[Launched]:
    stream = EmulatedStream(traffic=True)
    marlin_experts(*experts_arguments(tokens, **EXPERTS), stream=stream, limit=10.0)
    # Weights are repacked once, when a model is loaded.
    return [launched for launched in stream.launched if "repack" not in launched.kernel]


def _compressor() -> None:
    compress_to_cache(**compressor_case(*C128A, 256, block_size=8).arguments, **KERNELS)


def row(operation: str, shape: str, launched: Launched) -> dict[str, object]:
    """What one launch executed, a program."""
    x, y, z = launched.grid
    programs = x * y * z
    warps, traffic = launched.counts.warps, launched.counts.traffic
    matrix = sum(count for opcode, count in warps.items() if opcode.startswith("mma"))
    moved = {
        memory: [
            sum(getattr(found, name) for key, found in traffic.items() if key[0] == memory)
            for name in ("taken", "least")
        ]
        for memory in ("shared", "global")
    }
    clocks = {
        "ptx": warps.total() / _QUARTERS,
        "matrix": matrix * _MATRIX_CLOCKS / _QUARTERS,
        "shared": moved["shared"][0],
    }
    bound = max(clocks, key=clocks.__getitem__)
    return {
        "operation": operation,
        "shape": shape,
        "kernel": _name(launched.kernel),
        "programs": programs,
        "warps": launched.warps,
        "ptx": round(warps.total() / programs),
        "matrix": round(matrix / programs),
        "barriers": round(warps["bar.sync"] / programs / launched.warps, 1),
        **_columns("shared", *moved["shared"], programs),
        **_columns("global", *moved["global"], programs),
        "bound": f"{bound}, {round(clocks[bound] / programs):,} clocks",
    }


def _name(symbol: str) -> str:
    """A kernel's name; of Marlin's its parameters as well: threads, and tiles of 16 by 16 by 16."""
    if "Marlin" in symbol:
        threads, rows, columns, depth, *_ = re.findall(r"ELi(\d+)", symbol)
        return f"Marlin {threads}, {rows} x {columns} x {depth}"
    return symbol.removeprefix("_").removesuffix("_tilelang_kernel")


def _columns(name: str, taken: int, least: int, programs: int) -> dict[str, object]:
    return {name: round(taken / programs), f"{name}_x": round(taken / least, 2) if least else None}


def main() -> None:
    """Print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--op", action="append", help="only this operation; may be repeated")
    arguments = parser.parse_args()
    if arguments.lowering:
        parser.error("--lowering: the emulator runs sm_120's alone")
    named = [operation for operation, *_ in calls()]
    for operation in arguments.op or ():
        if operation not in named:
            parser.error(f"--op: {operation!r}, allowed: {', '.join(dict.fromkeys(named))}")
    report = Report(arguments, "emulated SM120")
    for operation, shape, call in calls():
        if arguments.op and operation not in arguments.op:
            continue
        with emulated_gpu(traffic=True) as gpu:
            launches = call() or gpu.launched
        report.rows([row(operation, shape, launched) for launched in launches])


if __name__ == "__main__":
    main()
