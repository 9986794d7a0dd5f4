"""What a run must not keep: secrets in a command line and in the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

HIDDEN = "***"
# Of the environment what changes how a server runs; the one that the suite starts takes it over.
KEPT = re.compile(r"(SM12X|NCCL|VLLM|TORCH)_\w+|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS")
KEPT_NAMES = "SM12X_*, NCCL_*, VLLM_*, TORCH_*, CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS"
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")
# `--api-key` and `--hf-token`, but neither `--tokenizer` nor `--max-num-batched-tokens`.
_WORD = r"(?:\w+[-_])*(?:api_?key|key|token|secret|password)"
_FLAG = re.compile(rf"--?{_WORD}", re.IGNORECASE)
# With its value in one argument: `--api-key=X`, `HF_TOKEN=X`, a shell's line, a header.
_INSIDE = re.compile(
    rf"(?P<name>(?<![\w-])(?:--?{_WORD}(?:=|\s+)|{_WORD}=|Bearer\s+))"
    r"(?P<value>'[^']*'|\"[^\"]*\"|[^\s'\"]+)",
    re.IGNORECASE,
)


def command(arguments: Sequence[str]) -> list[str]:
    """A command line with ``***`` in place of each secret.

    All that follows ``--api-key`` up to the next flag is hidden: vLLM takes several keys there.
    """
    kept, hiding = [], False
    for argument in arguments:
        # A key may begin with a dash. What follows the flag at once is its value.
        flag = argument.startswith("-") and not (hiding and kept and _FLAG.fullmatch(kept[-1]))
        if hiding and not flag:
            kept.append(HIDDEN)
            continue
        hiding = bool(_FLAG.fullmatch(argument))
        kept.append(argument if hiding else _INSIDE.sub(rf"\g<name>{HIDDEN}", argument))
    return kept


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a run keeps, by name."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if KEPT.fullmatch(name) and not SECRET.search(name)
    }
