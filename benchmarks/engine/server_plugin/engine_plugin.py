"""vLLM plugins of the measured server: weights made on the GPU, and a log of what Triton compiles.

vLLM runs both in every process of the server. ``tests/engine`` must be on ``PYTHONPATH``.
"""

from __future__ import annotations

import json
import os
import time

COMPILE_LOG = "ENGINE_COMPILE_LOG"


def made_weights() -> None:
    """Register ``--load-format made``."""
    import made_weights  # noqa: F401


def compile_log() -> None:
    """Append a line for each kernel that Triton compiles to the file that a variable names.

    A line holds the end (``at``, seconds since the epoch), the kernel's name and the seconds; a
    kernel that came from Triton's cache is left out.
    """
    path = os.environ.get(COMPILE_LOG)
    if not path:
        return
    from triton import knobs

    def listen(*, src, metadata, metadata_group, times, cache_hit) -> None:
        if cache_hit:
            return
        line = {"at": time.time(), "kernel": str(metadata["name"]), "s": times.total / 1e6}
        # One write of a short line: processes do not mix theirs.
        with open(path, "ab", buffering=0) as lines:
            lines.write((json.dumps(line) + "\n").encode())

    knobs.compilation.listener = listen
