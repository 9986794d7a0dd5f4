"""By which of Triton's lowerings our kernels are compiled, decided in this one place.

Triton 3.6.0 turns an FP8 ``tl.dot`` into the e4m3 matrix instruction on sm_120, and into an f16 one
on sm_121, which halves its rate. The launch option ``arch="sm120"`` gives every GPU sm_120's
lowering, assembled for the GPU at hand. GB10 needs it; on Hopper it makes the twin run: the code
that SM12x would run.

The environment variable ``SM12X_LOWERING`` says which: ``auto`` (the default; sm120 on capability
12.1 with a Triton before 3.9, else native), ``native`` or ``sm120``.
"""

from __future__ import annotations

import functools

from vllm_sm12x import settings

ENV = "SM12X_LOWERING"

# The setting of this process.
setting = settings.Choice(ENV, ("auto", "native", "sm120"))

# Bytes that a block may have on SM12x: 100 KiB less the 1 KiB that the driver keeps.
SHARED_MEMORY_LIMIT = 101_376

# The first GPUs on which a kernel can be launched before the one ahead of it ends.
_OVERLAP_FROM = (9, 0)

# The first Triton that lowers an FP8 dot alike on sm_120 and sm_121.
_TRITON_WITH_FP8_ON_SM121 = (3, 9)


@functools.cache
def lowering(capability: tuple[int, int]) -> str:
    """``"native"`` or ``"sm120"``: how kernels are compiled for a GPU of this capability."""
    if setting() != "auto":
        return setting()
    needed = capability == (12, 1) and _triton_version() < _TRITON_WITH_FP8_ON_SM121
    return "sm120" if needed else "native"


def launch_options(capability: tuple[int, int] | None = None) -> dict[str, object]:
    """What a launch takes besides its arguments: ``kernel[grid](..., **launch_options())``.

    Args:
        capability: Of the GPU that is compiled for; by default that of the current GPU, asked once
            a process. Without a GPU nothing is needed.
    """
    if capability is None:
        capability = _current_capability()
    if capability is None or lowering(capability) == "native":
        return {}
    return {"arch": "sm120"}


def target_key(capability: tuple[int, int] | None = None) -> str:
    """``"sm_120"``, ``"sm_121"`` or ``"sm_90"``: which static configuration table a GPU takes.

    Hopper takes its own table, and sm_120's in the twin run. So does every other GPU, and who has
    none: its blocks fit into the shared memory of each from capability 8.0 on.

    Args:
        capability: By default that of the current GPU.
    """
    if capability is None:
        capability = _current_capability()
    if capability == (12, 1):
        return "sm_121"
    if capability == (9, 0) and lowering(capability) == "native":
        return "sm_90"
    return "sm_120"


def launches_overlap(capability: tuple[int, int]) -> bool:
    """Whether a kernel can start while the one ahead of it ends, and wait for that end itself."""
    return capability >= _OVERLAP_FROM


@functools.cache
def multiprocessors() -> int:
    """Those of the current GPU; without one, those of an RTX PRO 6000."""
    import torch

    if not torch.cuda.is_available():
        return 188
    return torch.cuda.get_device_properties().multi_processor_count


def clear_cache() -> None:
    """Forget what was decided, for tests that set the variable or fake a Triton."""
    for cached in (
        setting,
        lowering,
        multiprocessors,
        _triton_version,
        _current_capability,
    ):
        cached.cache_clear()


@functools.cache
def _triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def _current_capability() -> tuple[int, int] | None:
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None
