"""The configuration of a shallow model of DeepSeek V4 Flash's full width."""

from __future__ import annotations

import json
from pathlib import Path

# One of each kind before the kinds repeat: window only (0), C4A (4), C128A (128). The published
# model has [0, 0] + [4, 128] * 20 + [4], and one more entry for its MTP layer.
COMPRESS_RATIOS = (0, 4, 128, 4, 128)

# What asks for weights made in memory (`made_weights.py`), which that module alone can register.
LOAD_FORMAT = "made"

# The first layers of the published model route by a table of token ids; one suffices here.
HASH_LAYERS = 1


def flash_config(compress_ratios: tuple[int, ...] = COMPRESS_RATIOS) -> dict[str, object]:
    """``config.json`` as the published checkpoint has it, but for the number of layers."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "vocab_size": 129280,
        "hidden_size": 4096,
        "num_hidden_layers": len(compress_ratios),
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "sliding_window": 128,
        "compress_ratios": [*compress_ratios, 0],
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 2048,
        "num_hash_layers": HASH_LAYERS,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "hidden_act": "silu",
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
        },
        "max_position_embeddings": 1048576,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "expert_dtype": "fp4",
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
    }


def write_config(folder: Path, compress_ratios: tuple[int, ...] = COMPRESS_RATIOS) -> None:
    """Write ``config.json`` into ``folder``, which is made where it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(flash_config(compress_ratios), indent=2) + "\n")
