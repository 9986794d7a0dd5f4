"""The tripwires: what is forbidden raises when it is called, and not before."""

import subprocess
import sys
from pathlib import Path

import pytest

import tripwire

HERE = Path(__file__).resolve().parent


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", tripwire.FORBIDDEN)
def test_a_forbidden_call_raises_and_is_counted(name):
    out = run(
        f"""
import importlib, importlib.util
import tripwire
tripwire.install()
assert importlib.util.find_spec({name!r}) is not None
kernel = importlib.import_module({name!r}).some_kernel
annotation = kernel | None
print("imported", tripwire.calls)
try:
    kernel(1, out=2)
except tripwire.NativeKernelCalledError as error:
    print(error, tripwire.calls)
"""
    )
    path = f"{name}.some_kernel"
    assert out == f"imported []\n{path} was called on the portable path ['{path}']\n"


def test_install_after_the_fact_is_an_error():
    out = run(
        """
import sys, types
import tripwire
sys.modules["tilelang"] = types.ModuleType("tilelang")
tripwire.install()
"""
    )
    assert "RuntimeError: tilelang is already imported; install the tripwire first" in out
