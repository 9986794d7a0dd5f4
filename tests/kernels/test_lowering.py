"""``vllm_sm12x.lowering``: which lowering a GPU gets, and what the setting may say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_sm12x import lowering

SM120 = {"arch": "sm120"}
HOPPER, SM_120, SM_121 = (9, 0), (12, 0), (12, 1)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(lowering.ENV, raising=False)
    lowering.clear_cache()
    yield
    lowering.clear_cache()


@pytest.fixture
def gpu_of(monkeypatch):
    """Fake the GPU at hand."""

    def fake(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return fake


@pytest.mark.parametrize(
    ("setting", "version", "capability", "expected"),
    [
        ("auto", "3.6.0", SM_121, SM120),
        ("auto", "3.8.1", SM_121, SM120),
        ("auto", "3.9.0", SM_121, {}),
        ("auto", "3.10.0+git1", SM_121, {}),
        ("auto", "4.0.0", SM_121, {}),
        ("auto", "3.6.0", SM_120, {}),
        ("auto", "3.6.0", HOPPER, {}),
        ("auto", "3.6.0", (10, 0), {}),
        ("native", "3.6.0", SM_121, {}),
        ("native", "3.6.0", HOPPER, {}),
        ("sm120", "3.9.0", SM_121, SM120),
        ("sm120", "3.6.0", HOPPER, SM120),
    ],
)
def test_options_of_a_launch(monkeypatch, setting, version, capability, expected):
    monkeypatch.setenv(lowering.ENV, setting)
    monkeypatch.setattr(triton, "__version__", version)
    assert lowering.launch_options(capability) == expected


@pytest.mark.parametrize(("capability", "expected"), [(SM_121, SM120), (SM_120, {}), (None, {})])
def test_the_gpu_at_hand_is_asked(monkeypatch, gpu_of, capability, expected):
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    gpu_of(capability)
    assert lowering.launch_options() == expected


@pytest.mark.parametrize(
    ("setting", "capability", "expected"),
    [
        ("auto", SM_120, "sm_120"),
        ("auto", SM_121, "sm_121"),
        ("sm120", SM_121, "sm_121"),
        ("native", SM_121, "sm_121"),
        ("auto", HOPPER, "sm_90"),
        ("native", HOPPER, "sm_90"),
        ("sm120", HOPPER, "sm_120"),
        ("auto", (8, 0), "sm_120"),
        ("auto", (10, 0), "sm_120"),
    ],
)
def test_table_of_a_gpu(monkeypatch, gpu_of, setting, capability, expected):
    monkeypatch.setenv(lowering.ENV, setting)
    assert lowering.target_key(capability) == expected
    gpu_of(capability)
    assert lowering.target_key() == expected


def test_without_a_gpu_the_table_is_sm_120s(gpu_of):
    gpu_of(None)
    assert lowering.target_key() == "sm_120"


@pytest.mark.parametrize("value", ["", "  ", " auto "])
def test_an_empty_setting_is_auto(value):
    assert lowering.setting.parse(value) == "auto"


@pytest.mark.parametrize("value", ["sm121", "SM120", "native,sm120", "1"])
def test_a_bad_setting_is_refused(monkeypatch, value):
    message = f"SM12X_LOWERING={value!r} is not allowed; allowed: auto, native, sm120"
    with pytest.raises(ValueError, match=re.escape(message)):
        lowering.setting.parse(value)
    monkeypatch.setenv(lowering.ENV, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        lowering.launch_options(SM_120)


def test_the_setting_is_read_once(monkeypatch):
    monkeypatch.setenv(lowering.ENV, "sm120")
    assert lowering.launch_options(HOPPER) == SM120
    monkeypatch.setenv(lowering.ENV, "native")
    assert lowering.launch_options(HOPPER) == SM120
    lowering.clear_cache()
    assert lowering.launch_options(HOPPER) == {}


def run_python(code, **variables):
    """Run code in a process of its own, with the package that is tested here."""
    root = str(Path(lowering.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_bad_setting_stops_the_import():
    done = run_python("import vllm_sm12x.lowering", SM12X_LOWERING="fast")
    assert done.returncode == 1
    assert "ValueError: SM12X_LOWERING='fast' is not allowed" in done.stderr


def test_the_import_needs_no_other_package():
    code = "import sys, vllm_sm12x.lowering; print({'vllm', 'torch', 'triton'} & set(sys.modules))"
    assert run_python(code).stdout.strip() == "set()"


def test_the_limit_is_sm12xs():
    # 100 KiB a multiprocessor, less the 1 KiB that the driver reserves of a block.
    assert lowering.SHARED_MEMORY_LIMIT == 99 * 1024


@triton.jit
def product(a, b, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    place = index[:, None] * SIZE + index[None, :]
    tl.store(out + place, tl.dot(tl.load(a + place), tl.load(b + place)))


def check_instructions(setting, dtype, ptx):
    """Hopper's own products are wgmma; SM12x's are mma.sync with the operands' own type."""
    if setting == "native":
        assert "wgmma" in ptx and "mma.sync" not in ptx.replace("wgmma.mma_async.sync", "")
    else:
        kind = {torch.bfloat16: "bf16.bf16", torch.float8_e4m3fn: "e4m3.e4m3"}[dtype]
        assert re.search(rf"\bmma\.sync\.aligned\.m16n8k\d+\.row\.col\.f32\.{kind}\.f32\b", ptx)
        assert "wgmma" not in ptx


@pytest.mark.parametrize("setting", ["native", "sm120"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_twin_run_is_compiled_to_sm120s_instructions(monkeypatch, tmp_path, setting, dtype):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(lowering.ENV, setting)
    of = {torch.bfloat16: "*bf16", torch.float8_e4m3fn: "*fp8e4nv"}[dtype]
    signature = {"a": of, "b": of, "out": "*fp32", "SIZE": "constexpr"}
    kernel = triton.compile(
        ASTSource(product, signature, {"SIZE": 64}),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, **lowering.launch_options(HOPPER)},
    )
    check_instructions(setting, dtype, kernel.asm["ptx"])
    assert ".target sm_90a" in kernel.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["native", "sm120"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_twin_run_is_right(monkeypatch, setting, dtype):
    if torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setenv(lowering.ENV, setting)
    torch.manual_seed(0)
    size = 64
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    out = torch.full((size, size), float("nan"), device="cuda")
    kernel = product[(1,)](a, b, out, size, num_warps=4, **lowering.launch_options())
    check_instructions(setting, dtype, kernel.asm["ptx"])
    a, b = a.double(), b.double()
    # The products are exact. Hopper adds those of FP8 with some 14 bits.
    bound = size * 2.0**-13 * (a.abs() @ b.abs())
    assert ((out.double() - a @ b).abs() <= bound).all()
