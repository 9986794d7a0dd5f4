"""A faked CUDA platform for the dispatch tests: any capability, on a machine without a GPU.

The patched functions are vLLM's own, called in this process. vLLM asks ``current_platform`` for
the capability, and many modules bind that object when they are imported, so the fake is in place
before the first of them loads. When the last test of this folder is done, vLLM's own platform is
back in every module that had bound the fake one.

What looks at every address that a kernel forms runs in Triton's interpreter, in a child process
(``interpreted/``), because Triton must know at its import that it interprets. What else launches
kernels runs on the emulator of ``tests/kernels``: cases with ``kernels`` here, and in a child
process (``emulated/``) what needs vLLM without a faked GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

# An installed wheel is tested as installed; a bare checkout is tested in place.
if importlib.util.find_spec("vllm_sm12x") is None:
    sys.path.insert(0, str(HERE.parents[1] / "kernels"))

# The emulator, and what runs checks in a process of their own.
sys.path.append(str(HERE.parent / "kernels"))

# The tables below are written by hand: what each test expects must not come from dispatch.py.
NAMES = (
    "sparse_mla_decode",
    "sparse_mla_prefill",
    "mqa_logits",
    "paged_mqa_logits",
    "fp8_einsum",
    "fp8_linear",
    "mhc",
    "mxfp4_experts",
    "router_logits",
    "cutedsl",
    "window_rope",
)
# Operations that the tests here call as the engine does, with arguments that a kernel takes.
WITH_KERNELS = ("mqa_logits", "paged_mqa_logits", "fp8_einsum", "mhc")
CAPABILITIES = ((9, 0), (10, 0), (12, 0), (12, 1))
PORTABLE_BY_ITSELF = {(9, 0): False, (10, 0): False, (12, 0): True, (12, 1): True}


@dataclass(frozen=True)
class Case:
    """A GPU, what ``SM12X_PORTABLE`` holds (``None``: unset), and which path is right.

    With ``kernels`` our operations run their kernels, on the emulator of ``tests/kernels``.
    """

    capability: tuple[int, int]
    override: str | None
    portable: bool
    kernels: bool = False

    def __str__(self) -> str:
        major, minor = self.capability
        shown = self.override
        if shown is None:
            shown = "unset"
        elif len(shown) > 60:
            shown = "all_others"
        return f"{major}.{minor}-{shown}" + ("-kernels" if self.kernels else "")


def cases_of(operations: tuple[str, ...]) -> list[Case]:
    """Every capability with the override off, on, naming the operations, and naming the others."""
    alone = list(operations)
    if "fp8_linear" in alone and "fp8_einsum" not in alone:
        alone.append("fp8_einsum")  # fp8_linear cannot be listed without it
    dropped = set(operations)
    if "fp8_einsum" in dropped:
        dropped.add("fp8_linear")
    others = [name for name in NAMES if name not in dropped]
    kernels = set(operations) <= set(WITH_KERNELS)
    return [
        *(Case(capability, "all", True, True) for capability in ((12, 0), (12, 1)) if kernels),
        *(
            case
            for capability in CAPABILITIES
            for case in (
                Case(capability, None, PORTABLE_BY_ITSELF[capability]),
                Case(capability, "auto", PORTABLE_BY_ITSELF[capability]),
                Case(capability, "none", False),
                Case(capability, "all", True),
                Case(capability, ",".join(alone), True),
                Case(capability, ",".join(others), False),
            )
        ),
    ]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "operation(*names): the test's `portable` says whether these operations take our path",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("operation")
        assert marker is not None, "a test with `case` or `portable` needs the operation marker"
        metafunc.parametrize("case", cases_of(marker.args), ids=str)


# The fake platform.


def _import_with_stubs(name: str, stubs: dict[str, types.ModuleType]) -> types.ModuleType:
    """Import a module; where its compiled parts do not load here, with stubs in their place."""
    try:
        return importlib.import_module(name)
    except ImportError:
        absent = [stub for stub in stubs if stub not in sys.modules]
        for stub in absent:
            sys.modules[stub] = stubs[stub]
        try:
            return importlib.import_module(name)
        finally:
            for stub in absent:
                del sys.modules[stub]


def _fake_platform_class() -> type:
    cuda = _import_with_stubs(
        "vllm.platforms.cuda",
        {name: types.ModuleType(name) for name in ("vllm._C", "vllm._C_stable_libtorch")},
    )
    from vllm.platforms.interface import DeviceCapability

    class FakeCudaPlatform(cuda.CudaPlatformBase):
        capability = (9, 0)

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*cls.capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "fake"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return False

    return FakeCudaPlatform


def _rebind(old: object, new: object) -> None:
    """Replace one platform object by another in every vLLM module that has bound it."""
    for name, module in list(sys.modules.items()):
        if (
            name.startswith(("vllm.", "vllm_sm12x."))
            and name != "vllm.platforms"
            and module.__dict__.get("current_platform") is old
        ):
            module.current_platform = new


def _clear_caches() -> None:
    from vllm_sm12x import dispatch

    dispatch.clear_cache()
    deep_gemm = sys.modules.get("vllm.utils.deep_gemm")
    if deep_gemm is not None:
        deep_gemm.is_deep_gemm_supported.cache_clear()
        deep_gemm.is_deep_gemm_e8m0_used.cache_clear()


@pytest.fixture(scope="package")
def cuda() -> Iterator[type]:
    """The fake platform's class; its ``capability`` can be set."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here")
    patch = pytest.MonkeyPatch()
    import vllm.platforms

    platform = _fake_platform_class()()
    # After that import, which may itself have made vLLM decide.
    real = vllm.platforms._current_platform
    patch.setattr(vllm.platforms, "_current_platform", platform)
    patch.setitem(vllm.platforms.__dict__, "current_platform", platform)
    _rebind(real, platform)
    import vllm._custom_ops

    # Modules ask these while they are imported. The CUTLASS kernels exist for all four GPUs.
    for probe in (
        "cutlass_scaled_mm_supports_fp8",
        "cutlass_scaled_mm_supports_block_fp8",
        "cutlass_group_gemm_supported",
    ):
        patch.setattr(vllm._custom_ops, probe, lambda capability: True)
    flash_attn = types.ModuleType("vllm.vllm_flash_attn")
    for name in (
        "fa_version_unsupported_reason",
        "flash_attn_varlen_func",
        "get_scheduler_metadata",
        "is_fa_version_supported",
    ):
        setattr(flash_attn, name, None)
    _import_with_stubs("vllm.v1.attention.backends.fa_utils", {"vllm.vllm_flash_attn": flash_attn})
    yield type(platform)
    patch.undo()
    if real is None:
        # Still undecided before; whoever bound the fake one gets what vLLM would have found.
        _rebind(platform, vllm.platforms.current_platform)
    else:
        _rebind(platform, real)
    _clear_caches()


@pytest.fixture
def choose(
    cuda: type, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[tuple[int, int], str | None], None]]:
    """Set the capability and ``SM12X_PORTABLE``, as often as a test likes."""

    def set_both(capability: tuple[int, int], override: str | None) -> None:
        monkeypatch.setattr(cuda, "capability", capability)
        if override is None:
            monkeypatch.delenv("SM12X_PORTABLE", raising=False)
        else:
            monkeypatch.setenv("SM12X_PORTABLE", override)
        _clear_caches()

    yield set_both
    _clear_caches()


@pytest.fixture
def portable(case: Case, choose: Callable[[tuple[int, int], str | None], None]) -> Iterator[bool]:
    """Set up the case; whether the operations of the test's marker take our path in it."""
    choose(case.capability, case.override)
    if not case.kernels:
        yield case.portable
        return
    from emulated_gpu import emulated_gpu

    with emulated_gpu(case.capability, every_kernel=True):
        yield case.portable


@pytest.fixture(params=["reference", "kernels"])
def form(request: pytest.FixtureRequest, cuda: type) -> Iterator[str]:
    """Each test with our operations in plain PyTorch, and as their kernels on the emulator."""
    from emulated_gpu import emulated_gpu

    if request.param == "reference":
        yield request.param
        return
    with emulated_gpu(every_kernel=True):
        yield request.param
