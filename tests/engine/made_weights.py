"""A vLLM model loader that makes the weights: seeded, in the checkpoint's formats, of sane size.

vLLM's own ``load_format="dummy"`` leaves the packed experts at zero and everything else near it, so
that no wrong kernel would show. Here each linear keeps the variance of its input, FP8 blocks have
E8M0 scales and the experts are MXFP4, as in the published checkpoint. A parameter's values follow
from its name alone, so that two engines, or a model and its draft, hold the same weights.
"""

from __future__ import annotations

import math
import zlib

import torch
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from drawing import Kind, distinct_experts, draw
from flash_config import LOAD_FORMAT

# After those that begin and end a text.
_FIRST_LIVELY = 2

_E8M0_BIAS = 127
# Root mean square of the e4m3 weights before their scale: well inside the format's range.
_FP8_RMS = 16.0
# Root mean square of an e2m1 value whose four bits are drawn evenly.
_E2M1_RMS = math.sqrt(sum(v * v for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)) / 8)


def _exponent(rms: float, fan_in: int) -> int:
    """The power of two that turns values of this root mean square into 1 / sqrt(fan_in)."""
    return round(-math.log2(rms * math.sqrt(fan_in)))


@torch.no_grad()
def make_parameter(
    name: str, parameter: torch.Tensor, lively_tokens: int | None = None, experts: int = 256
) -> None:
    """Fill one parameter in place.

    Args:
        experts: That are routed to.
        lively_tokens: Only so many tokens, from 2 on, can be answered, so that a random draft is
            right now and then: the head has zeros for the others, and each row once more with the
            other sign, so that some logit is positive. Even; None: all tokens.

    Raises:
        ValueError: The parameter is of a kind that the checkpoint does not have, or
            ``lively_tokens`` is odd.
    """
    if lively_tokens is not None and (lively_tokens < 2 or lively_tokens % 2):
        raise ValueError(f"lively_tokens: {lively_tokens}, allowed: even numbers from 2 on")
    generator = torch.Generator(device=parameter.device)
    generator.manual_seed(zlib.crc32(name.encode()))

    leaf = name.rsplit(".", 1)[-1]
    fan_in = parameter.shape[-1]
    if leaf == "tid2eid":
        parameter.copy_(distinct_experts(*parameter.shape, experts, generator, parameter.device))
    elif parameter.dtype == torch.float8_e4m3fn:
        drawn = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        parameter.copy_((drawn * _FP8_RMS).clamp(-448, 448).to(parameter.dtype))
    elif parameter.dtype == torch.float8_e8m0fnu:
        # A scale covers 128 inputs.
        byte = _E8M0_BIAS + _exponent(_FP8_RMS, 128 * fan_in)
        parameter.view(torch.uint8).fill_(byte)
    elif parameter.dtype == torch.uint8 and leaf.endswith("_scale"):
        # A scale covers 32 inputs. Two neighbouring powers, so that a lost scale shows.
        byte = _E8M0_BIAS + _exponent(_E2M1_RMS, 32 * fan_in)
        parameter.random_(byte - 1, byte + 1, generator=generator)
    elif parameter.dtype == torch.uint8 and leaf.endswith("_weight"):
        parameter.random_(0, 256, generator=generator)
    elif not parameter.is_floating_point():
        raise ValueError(f"{name}: {parameter.dtype} {tuple(parameter.shape)} is not made here")
    else:
        kind = _kind(name, leaf, parameter.dim())
        parameter.copy_(draw(kind, parameter.shape, generator, parameter.device))
        if kind == "head" and lively_tokens is not None:
            half = parameter[_FIRST_LIVELY : _FIRST_LIVELY + lively_tokens // 2].clone()
            parameter.zero_()
            parameter[_FIRST_LIVELY : _FIRST_LIVELY + lively_tokens] = torch.cat((half, -half))


def _kind(name: str, leaf: str, dimensions: int) -> Kind:
    named: dict[str, Kind] = {
        "attn_sink": "sink",
        "e_score_correction_bias": "router_bias",
        "ape": "position_bias",
    }
    if leaf in named:
        return named[leaf]
    if leaf.startswith("hc_") and leaf.endswith("_scale"):
        return "hc_scale"
    if leaf.startswith("hc_") and leaf.endswith("_base"):
        return "hc_base"
    if dimensions == 1:
        return "norm"
    if "embed_tokens" in name:
        return "embedding"
    if "lm_head" in name or "shared_head" in name:
        return "head"
    return "linear"


@register_model_loader(LOAD_FORMAT)
class MadeWeightsLoader(BaseModelLoader):
    """``load_format="made"``; nothing is read or downloaded.

    ``model_loader_extra_config`` may name ``lively_tokens`` (see :func:`make_parameter`), on one
    GPU.
    """

    def download_model(self, model_config: ModelConfig) -> None:
        pass

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        lively = (self.load_config.model_loader_extra_config or {}).get("lively_tokens")
        experts = model_config.hf_config.n_routed_experts
        for name, parameter in model.named_parameters():
            make_parameter(name, parameter.data, lively, experts)
