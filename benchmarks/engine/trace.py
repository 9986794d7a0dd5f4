"""A trace of the torch profiler, as shares of a step by operation.

The operations are those of ``SM12X_PORTABLE``, whoever's kernels run them, and what lies between.
"""

from __future__ import annotations

import ast
import functools
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OPS = Path(__file__).resolve().parents[2] / "kernels" / "vllm_sm12x" / "ops"
OTHER = "other"
ON_THE_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
# vLLM's worker names each step's span so: requests and tokens in prefill, then in decode.
_STEP = re.compile(r"^execute_context_(?P<prefill>\d+)\(\d+\)_generation_(?P<decode>\d+)\(\d+\)$")

# Names of kernels that are not ours, the first that fits. FlashMLA, DeepGEMM, TileLang, Marlin,
# CUTLASS and cuBLAS on the native path; vLLM's own, Triton's and PyTorch's on both.
NAMES = tuple(
    (operation, re.compile(pattern))
    for operation, pattern in (
        ("sparse_mla_prefill", r"sparse_attn_fwd|SparseAttnFwd|sparse_prefill"),
        ("sparse_mla_decode", r"splitkv_mla|mla_combine|flash_fwd_mla|sched_meta|get_mla_metadata"),
        ("paged_mqa_logits", r"paged_mqa_logits"),
        ("mqa_logits", r"mqa_logits|clean_logits"),
        ("mhc", r"hc_prenorm|mhc|hc_head|hc_pre|hc_post|sinkhorn"),
        # DeepGEMM's GEMM of a batch of matrices is the einsum; of one matrix, a linear.
        ("fp8_einsum", r"fp8_gemm.*GemmType\)4|fp8_einsum|fp8_bmm"),
        ("fp8_linear", r"sm\d+_fp8_gemm|blockwise|scaled_mm|Fp8BlockScaled|w8a8_block_fp8"),
        ("mxfp4_experts", r"[Mm]arlin|fused_moe|moe_sum|moe_mul_sum|mul_sum_kernel"),
        ("routing", r"moe_align|count_and_sort|topk_softplus|topk_hash|grouped_topk|router_gemm"),
        ("indexer top-k", r"persistent_topk|[Tt]op_?[Kk]_?[Pp]er_?[Rr]ow|radix_topk|FilteredTopK"),
        ("KV gather", r"[Gg]ather_?[kK](?!ernel)"),
        ("compressor, caches", r"compress|save_partial_states|insert_k|indexer_k_quant"),
        (
            "indices, metadata",
            r"indices|metadata|slot_mapping|page_indices|uniform_decode|lens_ker",
        ),
        ("norms, rotary, quantisation", r"rms_?norm|rope|rotary|quant|silu|swiglu|act_and_mul"),
        ("communication", r"nccl|all_?reduce|AllReduce|cross_device_reduce|multimem"),
        ("sampling, drafting", r"sample|rejection|eagle|topp|softmax|argmax|ArgMax|penalt"),
        ("other matrix products", r"gemm|Gemm|GEMM|nvjet|cutlass|cublas|gemv|splitK|sm90_xmma"),
        ("compiled by torch", r"^triton_(poi|red|per|for)_"),
        ("copies", r"[Mm]emcpy|[Mm]emset|copy|fill|Fill|cat_|CatArray|index_|Index"),
        ("PyTorch", r"at::native|elementwise|reduce_kernel|cub::|thrust"),
    )
)


@dataclass
class Share:
    """One operation's part of a step: microseconds, launches, its share of the busy time."""

    operation: str
    us: float
    launches: float
    share: float
    kernels: list[str] = field(default_factory=list)


@dataclass
class Profile:
    """Of one step, in microseconds: from its first kernel to its last, and when a kernel ran.

    ``sum_us`` is more than ``busy_us`` where kernels of several streams run side by side.
    """

    steps: int
    span_us: float
    busy_us: float
    sum_us: float
    shares: list[Share]

    def record(self) -> dict[str, Any]:
        """As a row keeps it."""
        return asdict(self)


@functools.cache
def own_kernels() -> dict[str, str]:
    """The kernels in ``ops/`` by name, and the operation that each is of."""
    found: dict[str, str] = {}
    for path in sorted(OPS.rglob("*.py")):
        folder = path.relative_to(OPS).parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(map(_is_jit, node.decorator_list)):
                found[node.name] = _operation(folder, path.name)
    return found


def _is_jit(decorator: ast.expr) -> bool:
    named = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(named) in ("triton.jit", "gluon.jit")


def _operation(folder: str, file: str) -> str:
    if folder == "sparse_mla":
        return f"sparse_mla_{'prefill' if 'prefill' in file else 'decode'}"
    return {"compressor": "compressor, caches"}.get(folder, folder)


def classify(kernel: str) -> str:
    """The operation of a kernel, by the name that the profiler gives it."""
    if kernel in own_kernels():
        return own_kernels()[kernel]
    return next((operation for operation, name in NAMES if name.search(kernel)), OTHER)


def load(path: Path) -> list[dict[str, Any]]:
    """The events of a trace, packed with gzip or not.

    Raises:
        ValueError: It is no trace; the file is named.
    """
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        events = list(json.loads(text)["traceEvents"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no trace of the profiler: {error}") from error
    return [event for event in events if event.get("ph") == "X"]


def profile(events: Sequence[dict[str, Any]], of: str) -> Profile:
    """The mean step of a trace.

    Args:
        of: ``"prefill"`` or ``"decode"``: what a step must do to count. Scheduled ahead, a step or
            two have nothing left to do; they are short.

    Raises:
        ValueError: It holds no step, or no kernel.
    """
    named = [
        _STEP.match(event["name"]) for event in events if event.get("cat") == "user_annotation"
    ]
    steps = sum(found is not None and int(found[of]) > 0 for found in named)
    ran = [event for event in events if event.get("cat") in ON_THE_GPU]
    if not steps or not ran:
        raise ValueError(f"a trace of {steps} steps and {len(ran)} kernels says nothing of a step")
    us: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    kernels: dict[str, Counter[str]] = {}
    for event in ran:
        operation = classify(event["name"])
        us[operation] += event["dur"]
        launches[operation] += 1
        kernels.setdefault(operation, Counter())[event["name"]] += event["dur"]
    total = sum(us.values())
    shares = [
        Share(
            operation,
            round(spent / steps, 3),
            round(launches[operation] / steps, 2),
            round(spent / total, 4),
            [_short(name) for name, _ in kernels[operation].most_common(3)],
        )
        for operation, spent in us.most_common()
    ]
    first = min(event["ts"] for event in ran)
    last = max(event["ts"] + event["dur"] for event in ran)
    return Profile(
        steps,
        round((last - first) / steps, 3),
        round(_covered(ran) / steps, 3),
        round(total / steps, 3),
        shares,
    )


def _covered(events: Iterable[dict[str, Any]]) -> float:
    """Microseconds in which at least one of the events ran."""
    covered = 0.0
    until = float("-inf")
    for begin, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered


def _short(name: str) -> str:
    """A kernel's name without its template arguments."""
    return re.sub(r"^void ", "", name).split("<")[0].split("(")[0][:80] or name[:80]
