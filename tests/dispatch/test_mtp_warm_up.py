"""The warm-up runs of DeepSeek V4 with MTP: at most 32 requests; all else as upstream."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch


def engine(model_type: str = "deepseek_v4", method: str | None = "mtp") -> SimpleNamespace:
    drafting = None
    if method is not None:
        drafting = SimpleNamespace(
            method=method, rejection_sample_method="standard", draft_sample_method="greedy"
        )
    return SimpleNamespace(
        model_config=SimpleNamespace(
            multimodal_config=None, hf_config=SimpleNamespace(model_type=model_type)
        ),
        speculative_config=drafting,
        kernel_config=SimpleNamespace(enable_flashinfer_autotune=False),
        scheduler_config=SimpleNamespace(max_num_seqs=1000, max_num_batched_tokens=4096),
    )


OTHERS = [("deepseek_v3", "mtp"), ("deepseek_v4", "eagle3"), ("deepseek_v4", None)]


def sampled_rows(vllm_config: SimpleNamespace, rows: int, **kwargs: bool) -> tuple[int, ...]:
    """Rows that the real dummy sampler run gives the model, the sampler and the rejection sampler;
    the last is left out where nothing drafts.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner = object.__new__(GPUModelRunner)
    runner.device = torch.device("cpu")
    runner.vllm_config = vllm_config
    runner.speculative_config = vllm_config.speculative_config
    runner.model = SimpleNamespace(compute_logits=Mock(side_effect=lambda hidden: hidden))
    runner.sampler = Mock(logprobs_mode="raw_logprobs")
    runner.rejection_sampler = Mock()
    runner._dummy_sampler_run(torch.full((rows, 5), torch.nan), **kwargs)
    (hidden,) = runner.model.compute_logits.call_args.args
    assert torch.isfinite(hidden).all()
    taken = [hidden.shape[0], runner.sampler.call_args_list[0].kwargs["logits"].shape[0]]
    if vllm_config.speculative_config:
        taken.append(runner.rejection_sampler.call_args.args[2].shape[0])
    return tuple(taken)


@pytest.mark.operation("mhc")
@pytest.mark.parametrize("rows", [31, 33])
def test_the_sampler_warm_up(case, choose, rows):
    choose(case.capability, case.override)
    # Any portable operation is enough, and a list of all the others is one.
    capped = case.portable or "," in (case.override or "")
    expected = min(rows, 32) if capped else rows
    assert sampled_rows(engine(), rows) == (expected, expected, 2 * expected)


@pytest.mark.operation("mhc")
def test_the_profile_run_reserves_for_every_row(case, choose):
    choose(case.capability, case.override)
    assert sampled_rows(engine(), 1000, is_profile=True) == (1000, 1000, 2000)


def test_the_profile_run_says_that_it_is_one(choose, monkeypatch):
    from vllm.v1.worker import gpu_model_runner

    choose((12, 0), None)
    group = SimpleNamespace(is_last_rank=True)
    monkeypatch.setattr(gpu_model_runner, "get_pp_group", lambda: group)
    runner = object.__new__(gpu_model_runner.GPUModelRunner)
    runner.supports_mm_inputs = False
    runner.is_pooling_model = False
    runner.max_num_tokens = 4096
    runner.encoder_cache = {}
    last = torch.zeros(1000, 5)
    runner._dummy_run = Mock(return_value=(torch.zeros(4096, 5), last))
    runner._dummy_sampler_run = Mock()
    runner._sync_device = Mock()
    runner.profile_run()
    runner._dummy_sampler_run.assert_called_once_with(last, is_profile=True)


@pytest.mark.parametrize(("model_type", "method"), OTHERS)
def test_the_sampler_warm_up_of_others(choose, model_type, method):
    choose((12, 0), None)
    rows = sampled_rows(engine(model_type, method), 1000)
    assert rows == ((1000, 1000) if method is None else (1000, 1000, 2000))


def decode_runs(
    vllm_config: SimpleNamespace, query_len: int = 3, v2: bool = False
) -> list[tuple[int, dict[str, object]]]:
    """The dummy runs of the real kernel warm-up: tokens and how."""
    from vllm.model_executor.warmup.kernel_warmup import kernel_warmup

    runner = SimpleNamespace(
        uniform_decode_query_len=query_len,
        is_pooling_model=False,
        attn_groups=[],
        _dummy_run=Mock(),
    )
    worker = SimpleNamespace(
        vllm_config=vllm_config,
        scheduler_config=vllm_config.scheduler_config,
        model_runner=runner,
        use_v2_model_runner=v2,
    )
    kernel_warmup(worker)
    return [(call.args[0], call.kwargs) for call in runner._dummy_run.call_args_list]


@pytest.fixture
def without_other_warm_ups(monkeypatch):
    """Other warm-ups, steps of the same function, are not the subject here."""
    from vllm_sm12x.adapters import warm_up

    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "0")
    monkeypatch.setattr(warm_up, "_applies", lambda worker: False)


@pytest.mark.operation("mhc")
@pytest.mark.parametrize("query_len", [2, 3, 4])
def test_the_decode_warm_up(case, choose, without_other_warm_ups, query_len):
    from vllm.config import CUDAGraphMode

    choose(case.capability, case.override)
    runs = decode_runs(engine(), query_len)
    if not (case.portable or "," in (case.override or "")):
        assert runs == []
        return
    ((tokens, how),) = runs
    assert tokens == 32 * query_len
    assert how == {
        "cudagraph_runtime_mode": CUDAGraphMode.NONE,
        "force_attention": True,
        "uniform_decode": True,
        "skip_eplb": True,
    }


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "tokens"),
    [
        (1, 4096, [3]),
        (4, 4096, [12]),
        (32, 4096, [96]),
        (33, 4096, [96]),
        (1000, 95, [93]),  # room for 31 requests of three tokens
        (1000, 3, [3]),
        (1, 2, []),
    ],
)
def test_the_decode_warm_up_fits_the_engine(
    choose, without_other_warm_ups, max_num_seqs, max_num_batched_tokens, tokens
):
    choose((12, 1), None)
    config = engine()
    config.scheduler_config.max_num_seqs = max_num_seqs
    config.scheduler_config.max_num_batched_tokens = max_num_batched_tokens
    assert [run[0] for run in decode_runs(config)] == tokens


@pytest.mark.parametrize(("model_type", "method"), OTHERS)
def test_no_decode_warm_up_of_others(choose, without_other_warm_ups, model_type, method):
    choose((12, 0), None)
    assert decode_runs(engine(model_type, method)) == []


def test_the_second_runner_warms_itself_up(choose, without_other_warm_ups):
    choose((12, 0), None)
    assert decode_runs(engine(), v2=True) == []
