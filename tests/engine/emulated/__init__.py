"""vLLM's whole engine on a GPU that is emulated: real scheduler, KV cache, worker, runner, loader.

Triton compiles vLLM's kernels and ours for sm_120a, and the emulator of ``tests/kernels`` runs what
it compiled. PyTorch's operations run on the CPU. Operations of vLLM's C++ binaries have stand-ins
in PyTorch (:mod:`.compiled_ops`), calls into CUDA itself do nothing (:mod:`.gpu`).

    python -m tests.engine.emulated score FOLDER --out RUN.npz --kernels all
    python -m tests.engine.emulated answer mtp0 mtp2-cache --out FOLDER
"""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[2]
# The emulator, and what is shared with the programs that run the engine on a GPU.
sys.path[:0] = [str(_TESTS / "kernels"), str(_TESTS / "engine")]
