"""``vllm serve`` with the options of README.md, for a model on this machine and no network."""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.engine.environment import ENGINE, LOWERINGS, PATHS, TP_COMPILATION

HOST = "127.0.0.1"
MODEL_NAME = "deepseek-v4-made"


@dataclass(frozen=True)
class Serve:
    """One server. Lengths are in tokens; ``memory`` is the share of a GPU's memory.

    ``extra`` are further options, at the end, where they win over those before.
    """

    model: Path
    port: int
    tp: int = 1
    mtp: int = 2
    max_model_len: int = 131072
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 4096
    memory: float = 0.9
    prefix_cache: bool = True
    load_format: str = "auto"
    extra: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Where it answers, without ``/v1``."""
        return f"http://{HOST}:{self.port}"

    def command(self, python: str = sys.executable) -> list[str]:
        """The command, by module: an environment that was unpacked has no script of that name."""
        reasoning = {
            "reasoning_parser": "deepseek_v4",
            "reasoning_start_str": "<think>",
            "reasoning_end_str": "</think>",
        }
        drafting = {"method": "mtp", "num_speculative_tokens": self.mtp}
        prefix_cache = "" if self.prefix_cache else "no-"
        return [
            *(python, "-m", "vllm.entrypoints.cli.main", "serve", str(self.model)),
            *("--host", HOST, "--port", str(self.port)),
            *("--served-model-name", MODEL_NAME, "--load-format", self.load_format),
            *("--kv-cache-dtype", "fp8", "--block-size", "256"),
            *("--max-model-len", str(self.max_model_len)),
            *("--max-num-seqs", str(self.max_num_seqs)),
            *("--max-num-batched-tokens", str(self.max_num_batched_tokens)),
            *("--tensor-parallel-size", str(self.tp)),
            *(("--compilation-config", json.dumps(TP_COMPILATION)) if self.tp > 1 else ()),
            *("--gpu-memory-utilization", str(self.memory)),
            *("--tokenizer-mode", "deepseek_v4"),
            *("--tool-call-parser", "deepseek_v4", "--enable-auto-tool-choice"),
            *("--reasoning-parser", "deepseek_v4"),
            *("--reasoning-config", json.dumps(reasoning)),
            *(("--speculative-config", json.dumps(drafting)) if self.mtp else ()),
            *("--no-enable-flashinfer-autotune", f"--{prefix_cache}enable-prefix-caching"),
            *self.extra,
        ]


def variables(path: str, kernels: str = "auto", lowering: str = "auto") -> dict[str, str]:
    """The environment of a server on one path; the form of its operations where it is portable.

    Raises:
        ValueError: There is no such path or lowering.
    """
    for name, value, allowed in (("path", path, PATHS), ("lowering", lowering, LOWERINGS)):
        if value not in allowed:
            raise ValueError(f"{name}: {value!r}, allowed: {', '.join(allowed)}")
    said = ENGINE | {
        "VLLM_NO_USAGE_STATS": "1",
        "SM12X_PORTABLE": "all" if path == "portable" else "none",
    }
    if path == "portable":
        return said | {"SM12X_KERNELS": kernels, "SM12X_LOWERING": lowering}
    # DeepGEMM would compile every shape that may ever come, for minutes.
    return said | {"VLLM_DEEP_GEMM_WARMUP": "skip"}


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as one:
        one.bind((HOST, 0))
        return one.getsockname()[1]
