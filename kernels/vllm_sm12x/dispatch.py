"""Which operations take the portable path: on SM12x all of them, elsewhere none, unless told.

The environment variable ``SM12X_PORTABLE`` overrides the choice. Its name does not begin with
``VLLM_``, because vLLM warns about (or refuses) variables of that prefix that it does not know.
"""

from __future__ import annotations

import functools
import os

from vllm_sm12x import settings

ENV = "SM12X_PORTABLE"

# Name of an operation: what the portable path replaces there.
OPERATIONS = {
    "sparse_mla_decode": "FlashMLA's decode over the paged fp8_ds_mla cache",
    "sparse_mla_prefill": "FlashMLA's sparse prefill over the gathered bf16 keys",
    "mqa_logits": "DeepGEMM's FP8 MQA logits (indexer, prefill)",
    "paged_mqa_logits": "DeepGEMM's paged FP8 MQA logits and their schedule (indexer, decode)",
    "fp8_einsum": "DeepGEMM's grouped FP8 einsum (output projection)",
    "fp8_linear": "FP8 block linears: E8M0 scales become float32, DeepGEMM is not chosen",
    "mhc": "TileLang's and DeepGEMM's hyper-connection kernels",
    "mxfp4_experts": "Marlin's MXFP4 experts",
    "router_logits": "the router's product that is rounded to bfloat16 (float32 results are kept)",
    "cutedsl": "CuTeDSL's compressor and cache kernels (upstream's Triton forms are used)",
    "window_rope": "YaRN on window-only layers (plain RoPE, as the checkpoint was trained)",
}

# An operation that cannot be portable alone: DeepGEMM's einsum takes the output projection's weight
# in the layout that DeepGEMM's own linear prepares, and the portable linear does not make it.
REQUIRES = {"fp8_linear": "fp8_einsum"}

ALLOWED = (
    f"auto (the default: all on SM12x, none elsewhere), all, none, or a comma-separated list of "
    f"{', '.join(OPERATIONS)}"
)


def parse_override(value: str) -> frozenset[str] | None:
    """Operations that ``SM12X_PORTABLE=value`` forces; ``None`` means that the GPU decides.

    A list is exact: operations that it does not name take upstream's path, on SM12x too.

    Raises:
        ValueError: The value names something that is not an operation, or an operation without the
            one that it requires; the message says what is allowed.
    """
    forced = settings.names(ENV, value, OPERATIONS, ALLOWED)
    if forced is None:
        return None
    for operation, required in REQUIRES.items():
        if operation in forced and required not in forced:
            raise ValueError(
                f"{ENV}={value!r}: {operation} requires {required}; add it to the list"
            )
    return forced


@functools.cache
def is_sm12x() -> bool:
    """Whether the GPU at hand is of the SM12x family (capability 12.0 or 12.1)."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda() and bool(current_platform.is_device_capability_family(120))


@functools.cache
def portable_operations() -> frozenset[str]:
    """The operations on the portable path. Read once a process, hence before any graph capture."""
    forced = parse_override(os.environ.get(ENV, "auto"))
    if forced is not None:
        return forced
    return frozenset(OPERATIONS) if is_sm12x() else frozenset()


def portable_enabled(operation: str) -> bool:
    """Whether ``operation`` (a key of :data:`OPERATIONS`) takes the portable path."""
    if operation not in OPERATIONS:
        raise ValueError(f"operation: {operation!r}, allowed: {', '.join(OPERATIONS)}")
    return operation in portable_operations()


def clear_cache() -> None:
    """Forget what was decided, for tests that fake a capability or set the variable."""
    is_sm12x.cache_clear()
    portable_operations.cache_clear()


# A bad value stops whatever imports this, before a model is loaded.
parse_override(os.environ.get(ENV, "auto"))
