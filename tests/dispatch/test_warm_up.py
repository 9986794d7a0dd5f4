"""The warm-up before serving, on vLLM's own model and without a GPU.

The checks run in a process of their own: Triton is there only where vLLM sees no GPU driver that is
inactive, and the model is built on the CPU for a GPU that does not exist.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from child_checks import run_checks

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_no_step_of_serving_compiles():
    kernels = [] if importlib.util.find_spec("vllm_sm12x") else [str(ROOT / "kernels")]
    paths = [str(ROOT), *kernels, *filter(None, [os.environ.get("PYTHONPATH")])]
    run_checks(
        HERE / "warm_up",
        at_least=75,
        PYTHONPATH=os.pathsep.join(paths),
        SM12X_PORTABLE="all",
        SM12X_KERNELS="all",
        SM12X_LOWERING="auto",
    )


def test_vllm_warms_up_before_it_captures(choose, monkeypatch):
    """The kernels first, so that no run before serving compiles one of them by itself."""
    from vllm.model_executor.warmup import kernel_warmup

    choose((12, 0), None)
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "0")
    order = []
    for name in ("warm_up_kernels", "warm_up_mixed_batch", "warm_up_uniform_decode"):
        note = Mock(side_effect=lambda worker, name=name: order.append((name, worker)))
        monkeypatch.setattr(kernel_warmup, name, note)
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(
            kernel_config=SimpleNamespace(enable_flashinfer_autotune=False)
        ),
        model_runner=SimpleNamespace(is_pooling_model=False, attn_groups=[]),
    )
    kernel_warmup.kernel_warmup(worker)
    assert order == [
        ("warm_up_kernels", worker),
        ("warm_up_mixed_batch", worker),
        ("warm_up_uniform_decode", worker),
    ]


@pytest.mark.parametrize("override", [None, "none"])
def test_no_gpu_of_ours_is_warmed_up(choose, override):
    """On Hopper, and where nothing is portable, neither looks at the model or runs it."""
    from vllm_sm12x.adapters import warm_up

    choose((9, 0) if override is None else (12, 0), override)
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type="deepseek_v4"))
        ),
        get_model=Mock(),
        model_runner=SimpleNamespace(_dummy_run=Mock()),
    )
    warm_up.warm_up_kernels(worker)
    warm_up.warm_up_mixed_batch(worker)
    worker.get_model.assert_not_called()
    worker.model_runner._dummy_run.assert_not_called()
