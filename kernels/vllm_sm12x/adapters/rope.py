"""Rotary embedding of DeepSeek V4's window-only layers.

YaRN belongs to the compressed layers alone; window-only layers (and the MTP block) use plain RoPE
with their own theta. vLLM 0.22.1 gives all of them YaRN; later releases and transformers do not.
"""

from __future__ import annotations

from typing import Any


def window_rope_parameters(
    rope_parameters: dict[str, Any], max_position_embeddings: int
) -> dict[str, Any]:
    """A copy of ``rope_parameters`` that makes YaRN the identity: factor 1 over all positions.

    The rotary class stays the one that the fused kernels read their float32 table from, and the
    table keeps ``max_position_embeddings`` rows.

    Args:
        rope_parameters: As ``get_rope`` takes them, with ``rope_theta`` already the layer's own.
        max_position_embeddings: The rows that the table must have.
    """
    return {
        **rope_parameters,
        "factor": 1.0,
        "original_max_position_embeddings": max_position_embeddings,
    }
