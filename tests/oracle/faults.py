"""Known ways to be wrong, for the question whether an engine's difference is one of them.

Rounding hides a fault that changes little. But it hides none from a comparison with a run that has
the fault: see :func:`tests.oracle.agreement.fault_share`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4DecoderLayer


def _same(config: dict[str, Any]) -> dict[str, Any]:
    return {}


def _unchanged(layer: DeepseekV4DecoderLayer) -> None:
    pass


@dataclass(frozen=True)
class Fault:
    """``fields`` gives the changed fields of ``config.json``; ``change`` alters a loaded layer."""

    about: str
    fields: Callable[[dict[str, Any]], dict[str, Any]] = _same
    change: Callable[[DeepseekV4DecoderLayer], None] = _unchanged


def _rope(config: dict[str, Any], main: dict[str, Any], compress: dict[str, Any]) -> dict[str, Any]:
    shared = {"partial_rotary_factor": config["qk_rope_head_dim"] / config["head_dim"]}
    return {
        "rope_scaling": None,
        "rope_parameters": {
            "main": main | shared | {"rope_theta": config["rope_theta"]},
            "compress": compress | shared | {"rope_theta": config["compress_rope_theta"]},
        },
    }


def _window_yarn(config: dict[str, Any]) -> dict[str, Any]:
    yarn = config["rope_scaling"] | {"attention_factor": 1.0}
    return _rope(config, main=yarn, compress=yarn)


def _no_yarn(config: dict[str, Any]) -> dict[str, Any]:
    plain = {"rope_type": "default"}
    return _rope(config, main=plain, compress=plain)


def _no_sinks(layer: DeepseekV4DecoderLayer) -> None:
    layer.self_attn.sinks.data.fill_(-1e9)


def _no_position_bias(layer: DeepseekV4DecoderLayer) -> None:
    if layer.self_attn.compressor is not None:
        layer.self_attn.compressor.position_bias.data.zero_()


def _late_entries(layer: DeepseekV4DecoderLayer) -> None:
    compressor = layer.self_attn.compressor
    if compressor is None:
        return
    compress = compressor.forward

    def late(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        entries, bias = compress(*args, **options)
        if bias is not None:
            hidden = torch.full_like(bias[:, :, :1], -torch.inf)
            bias = torch.cat([hidden, bias[:, :, :-1]], dim=2)
        return entries, bias

    compressor.forward = late


def _one_scale(layer: DeepseekV4DecoderLayer) -> None:
    layer.self_attn.o_b_proj.weight.data[:128, :128] *= 2


def _no_router_bias(layer: DeepseekV4DecoderLayer) -> None:
    for module in layer.mlp.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.zero_()


FAULTS = {
    "window_yarn": Fault(
        "YaRN on window-only layers too, as vLLM 0.22.1 without window_rope", _window_yarn
    ),
    "no_yarn": Fault("plain positions in compressed layers", _no_yarn),
    "window_127": Fault("a window that lacks its oldest token", lambda c: {"sliding_window": 127}),
    "half_the_entries": Fault(
        "the indexer selects half as many", lambda c: {"index_topk": c["index_topk"] // 2}
    ),
    "late_entries": Fault("compressed entries seen one token late", change=_late_entries),
    "no_position_bias": Fault("compressors without position bias", change=_no_position_bias),
    "no_sinks": Fault("softmax without the sinks", change=_no_sinks),
    "sinkhorn_3": Fault("3 Sinkhorn rounds", lambda c: {"hc_sinkhorn_iters": 3}),
    "no_router_bias": Fault("experts chosen by their scores alone", change=_no_router_bias),
    "no_routed_scale": Fault(
        "the experts' sum without its factor", lambda c: {"routed_scaling_factor": 1.0}
    ),
    "one_scale": Fault("one FP8 scale of wo_b twice too large", change=_one_scale),
}
