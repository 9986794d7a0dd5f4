"""What vLLM asks of DeepSeek V4's classes before it loads one, without a process for each.

vLLM's registry looks at a class in a process of its own, which imports all of vLLM and PyTorch for
it, and keeps what it saw in a cache on disk. A start with an empty cache waits for that, once for
the model and once for the draft model. What there is to see is written down here, under the hash of
the module by which the registry's cache knows it. Another module, and the registry looks itself.

Inert where no operation is on the portable path.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from vllm_sm12x.dispatch import portable_operations

if TYPE_CHECKING:
    from vllm.model_executor.models.registry import _ModelInfo

MODULE = "vllm.models.deepseek_v4"
# Of the file that chooses between the classes for NVIDIA's GPUs and for AMD's.
MODULE_HASH = "390c1a36e7bb30a2215966854b2d4ec9"
# Whether layers may be spread over a pipeline of GPUs is what the two classes differ in.
SUPPORTS_PP = {"DeepseekV4ForCausalLM": True, "DeepSeekV4MTP": False}


def known_model_info(module: str, name: str, module_hash: str) -> _ModelInfo | None:
    """What the registry would see in a class, or None where it must look itself.

    Args:
        module: Where the class is defined.
        name: The class.
        module_hash: Of the module's file, as the registry makes it.
    """
    if (module, module_hash) != (MODULE, MODULE_HASH) or name not in SUPPORTS_PP:
        return None
    from vllm.platforms import current_platform

    if not current_platform.is_cuda() or not portable_operations():
        return None
    from vllm.model_executor.models.registry import _ModelInfo

    seen = dict.fromkeys((field.name for field in fields(_ModelInfo)), False) | {
        "architecture": name,
        "is_text_generation_model": True,
        "attn_type": "decoder",
        "default_seq_pooling_type": "LAST",
        "default_tok_pooling_type": "ALL",
        "score_type": "bi-encoder",
        "supports_pp": SUPPORTS_PP[name],
    }
    return _ModelInfo(**seen)
