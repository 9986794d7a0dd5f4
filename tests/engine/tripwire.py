"""Makes every call into FlashMLA, DeepGEMM, TileLang and CuTeDSL an error.

The packages stay visible (vLLM asks whether they are installed), but whatever is taken from them
raises when it is called. Install before vLLM is imported, in the process that runs the model.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType

# What the portable path must not reach. The names are those that vLLM imports.
FORBIDDEN = (
    "deep_gemm",
    "vllm.third_party.deep_gemm",
    "vllm._flashmla_C",
    "vllm._flashmla_extension_C",
    "vllm.third_party.flashmla",
    "vllm.third_party.flashmla.flash_mla_interface",
    "vllm._tilelang_ops",
    "tilelang",
    "vllm.models.deepseek_v4.nvidia.ops.dequant_gather_k_cutedsl",
    "vllm.models.deepseek_v4.nvidia.ops.fused_indexer_q_cutedsl",
    "vllm.models.deepseek_v4.nvidia.ops.sparse_attn_compress_cutedsl",
)


class NativeKernelCalledError(RuntimeError):
    """Something on the way called into a package that has no SM12x code."""


calls: list[str] = []


def _forbidden_class(path: str) -> type:
    # A class, and not a function: vLLM uses some of these names in annotations.
    def refuse(cls: type, *args: object, **kwargs: object) -> object:
        calls.append(path)
        raise NativeKernelCalledError(f"{path} was called on the portable path")

    return type(path.rsplit(".", 1)[-1], (), {"__new__": refuse})


class _ForbiddenModule(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__path__ = []

    def __getattr__(self, attribute: str) -> type:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _forbidden_class(f"{self.__name__}.{attribute}")


def install() -> None:
    """Put the tripwires in place.

    Raises:
        RuntimeError: One of the packages, or vLLM's module that binds it, is already imported.
    """
    late = [name for name in (*FORBIDDEN, "vllm.v1.attention.ops.flashmla") if name in sys.modules]
    if late:
        raise RuntimeError(f"{late[0]} is already imported; install the tripwire first")
    for name in FORBIDDEN:
        sys.modules[name] = _ForbiddenModule(name)
