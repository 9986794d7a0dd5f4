"""NVIDIA's compiler, of the wheel's requirements: CUDA C++ to PTX for SM120, without a GPU."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ARCH = "sm_120"


def missing() -> str:
    """What this machine lacks to compile, or ``""``."""
    if shutil.which("c++") is None:
        return "nvcc needs a C++ compiler to read its headers"
    return ""


def compile_ptx(
    source: Path | str, include: Sequence[str | Path] = (), options: Sequence[str] = ()
) -> str:
    """The PTX of a source.

    Args:
        source: A file, or the text of one.
        include: Folders of headers, but for CUDA's.
        options: Further ones of nvcc.

    Raises:
        subprocess.CalledProcessError: nvcc refuses it; it has said why.
    """
    import nvidia.cu13

    (cuda,) = map(Path, nvidia.cu13.__path__)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        if isinstance(source, str):
            code = Path(folder) / "kernel.cu"
            code.write_text(source, encoding="utf-8")
        else:
            code = source
        subprocess.run(
            [
                cuda / "bin" / "nvcc",
                *("-ptx", "-std=c++17", f"-arch={ARCH}a", "-w"),
                # The wheels' compiler is of a later minor release than their headers.
                "-DCCCL_DISABLE_CTK_COMPATIBILITY_CHECK",
                *(f"-I{path}" for path in (*include, cuda / "include" / "cccl")),
                *options,
                *("-o", ptx, code),
            ],
            check=True,
            timeout=300,
        )
        return ptx.read_text(encoding="utf-8")
