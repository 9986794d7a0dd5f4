"""Processes that compile beside the start of an engine, and what the log says of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"
)


@pytest.fixture
def order(tmp_path, monkeypatch):
    """A kernel that an empty cache has not."""
    from kernel_orders import small_order

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    package = Path(importlib.util.find_spec("vllm_sm12x").origin).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(package))
    return small_order()


@pytest.fixture
def log(monkeypatch) -> Mock:
    from vllm_sm12x.adapters import compile_ahead

    monkeypatch.setattr(compile_ahead, "logger", log := Mock())
    return log


def said(calls: Mock) -> list[str]:
    return [call.args[0] % call.args[1:] for call in calls.call_args_list]


def test_orders_are_worked_off(order, log):
    from vllm_sm12x.adapters.compile_ahead import Ahead

    ahead = Ahead([order])
    assert len(ahead.processes) == 1
    ahead.finish()
    assert order.is_compiled()
    (line,) = said(log.info)
    assert line.startswith("Compiled 1 of 1 kernels ahead, in 1 processes; ")
    assert not said(log.warning)
    # What the cache has needs no process, and no line.
    again = Ahead([order])
    again.finish()
    assert not again.processes
    assert len(said(log.info)) == 1


def test_a_kernel_that_fails_is_named(order, log):
    from kernel_orders import broken

    from vllm_sm12x.adapters.compile_ahead import Ahead

    ahead = Ahead([broken(order)])
    ahead.finish()
    (line,) = said(log.warning)
    assert line.startswith(f"{order.name} was not compiled ahead and is compiled here: ")
    assert "fp7" in line
    assert said(log.info)[0].startswith("Compiled 0 of 1 kernels")


def test_a_process_that_dies_is_told(order, log):
    from vllm_sm12x.adapters.compile_ahead import Ahead

    ahead = Ahead([order])
    ahead.processes[0].kill()
    ahead.finish()
    (line,) = said(log.warning)
    assert line.startswith("1 of the processes that compile ahead ended with status -9; ")


def test_a_process_that_hangs_is_ended(order, log, monkeypatch):
    from vllm_sm12x.adapters import compile_ahead

    monkeypatch.setattr(compile_ahead, "PATIENCE_S", 0.0)
    ahead = compile_ahead.Ahead([order])
    ahead.finish()
    assert ahead.processes[0].returncode == -9
    assert len(said(log.warning)) == 1


@pytest.mark.parametrize(
    ("cores", "engines", "processes"), [(1, 1, 1), (2, 1, 1), (6, 1, 5), (64, 1, 8), (16, 4, 3)]
)
def test_engines_of_a_machine_share_its_cores(monkeypatch, cores, engines, processes):
    from vllm_sm12x.adapters import compile_ahead

    monkeypatch.setattr(compile_ahead.os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert compile_ahead._processes(engines) == processes


@pytest.mark.parametrize(("capability", "rank"), [((9, 0), 0), ((12, 0), 1)])
def test_other_gpus_and_ranks_order_nothing(choose, capability, rank):
    from vllm_sm12x.adapters import warm_up

    choose(capability, None)
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace()))
    config.model_config.hf_config.model_type = "deepseek_v4"
    worker = SimpleNamespace(vllm_config=config, local_rank=rank, get_model=Mock())
    with patch.object(torch.cuda, "is_available", lambda: True):
        warm_up.compile_sampling_ahead(worker)
        warm_up.compile_ahead(worker)
    worker.get_model.assert_not_called()
    assert not warm_up._ahead
