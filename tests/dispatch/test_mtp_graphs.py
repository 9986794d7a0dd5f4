"""Which CUDA graphs of decode are captured for DeepSeek V4 with MTP."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from tests.dispatch.conftest import NAMES

SIZES = [3, 6, 12, 24]


@pytest.fixture
def set_full_graphs(monkeypatch):
    """Set ``SM12X_MTP_FULL_GRAPHS``; ``None`` unsets it. No operation is proven, unless set."""
    from vllm_sm12x.adapters import mtp

    monkeypatch.setattr(mtp, "GRAPH_SAFE", frozenset())
    log = Mock()
    monkeypatch.setattr(mtp, "logger", log)

    def set_variable(value: str | None) -> Mock:
        if value is None:
            monkeypatch.delenv("SM12X_MTP_FULL_GRAPHS", raising=False)
        else:
            monkeypatch.setenv("SM12X_MTP_FULL_GRAPHS", value)
        mtp.clear_cache()
        return log

    set_variable(None)
    yield set_variable
    mtp.clear_cache()


def dispatcher(
    mode: str = "FULL_AND_PIECEWISE",
    model_type: str = "deepseek_v4",
    method: str | None = "mtp",
    max_num_seqs: int = 8,
    sizes: list[int] = SIZES,
    drafted: int = 2,
) -> object:
    """vLLM's dispatcher with the keys of an engine that drafts."""
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    compilation = CompilationConfig(
        cudagraph_mode=mode,
        mode=CompilationMode.VLLM_COMPILE,
        cudagraph_capture_sizes=list(sizes),
    )
    compilation.set_splitting_ops_for_v1(all2all_backend="naive", data_parallel_size=1)
    compilation.max_cudagraph_capture_size = sizes[-1]
    if mode != "NONE":
        compilation.adjust_cudagraph_sizes_for_spec_decode(1 + drafted, tensor_parallel_size=2)
    compilation.post_init_cudagraph_sizes()
    drafting = None
    if method is not None:
        drafting = SimpleNamespace(method=method, num_speculative_tokens=drafted)
    made = CudagraphDispatcher(
        SimpleNamespace(
            compilation_config=compilation,
            scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
            model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type)),
            speculative_config=drafting,
            lora_config=None,
        )
    )
    made.initialize_cudagraph_keys(CUDAGraphMode[mode], 1 + drafted)
    return made


def captured(made: object) -> dict[str, list[int]]:
    """Sizes by mode, of the graphs that would be captured."""
    return {
        mode.name: sorted(desc.num_tokens for desc in descs)
        for mode, descs in made.get_capture_descs()
    }


def test_the_published_number_of_graphs(choose, set_full_graphs):
    # vllm-project/vllm#41834 logs PIECEWISE=49 and no full graph with MTP=2. vLLM's default sizes:
    default = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    choose((12, 0), None)
    made = captured(dispatcher(max_num_seqs=256, sizes=default))
    assert {mode: len(sizes) for mode, sizes in made.items()} == {"PIECEWISE": 49}


BOTH = {"PIECEWISE": SIZES, "FULL": SIZES}
PIECEWISE = {"PIECEWISE": SIZES}


@pytest.mark.operation("mhc")
@pytest.mark.parametrize("setting", [None, "", "auto", " auto "])
def test_auto_skips_full_graphs_where_anything_is_portable(case, choose, set_full_graphs, setting):
    choose(case.capability, case.override)
    set_full_graphs(setting)
    skipped = case.portable or "," in (case.override or "")
    assert captured(dispatcher()) == (PIECEWISE if skipped else BOTH)


@pytest.mark.operation("mhc")
def test_never_skips_on_every_gpu_and_always_on_none(case, choose, set_full_graphs):
    choose(case.capability, case.override)
    set_full_graphs("never")
    assert captured(dispatcher()) == PIECEWISE
    set_full_graphs("always")
    assert captured(dispatcher()) == BOTH


def test_every_portable_operation_must_have_declared_itself_safe(
    choose, set_full_graphs, monkeypatch
):
    from vllm_sm12x.adapters import mtp

    choose((12, 0), None)
    monkeypatch.setattr(mtp, "GRAPH_SAFE", frozenset(NAMES))
    assert captured(dispatcher()) == BOTH
    for name in NAMES:
        monkeypatch.setattr(mtp, "GRAPH_SAFE", frozenset(NAMES) - {name})
        log = set_full_graphs(None)
        assert captured(dispatcher()) == PIECEWISE
        assert log.info_once.call_args.args[-1].endswith(f": {name}")
        # What is not on the path need not be safe.
        choose((9, 0), "mhc" if name != "mhc" else "cutedsl")
        assert captured(dispatcher()) == BOTH
        choose((12, 0), None)
    # A declaration does not overrule the setting.
    monkeypatch.setattr(mtp, "GRAPH_SAFE", frozenset(NAMES))
    set_full_graphs("never")
    assert captured(dispatcher()) == PIECEWISE


@pytest.mark.parametrize("drafted", [1, 2, 3, 4])
def test_full_graphs_are_the_default_with_the_drafts_that_were_shown(
    choose, set_full_graphs, monkeypatch, drafted
):
    from vllm_sm12x.adapters import mtp

    sizes = [(1 + drafted) * requests for requests in (1, 2, 4, 8)]
    both, piecewise = {"PIECEWISE": sizes, "FULL": sizes}, {"PIECEWISE": sizes}
    choose((12, 0), None)
    monkeypatch.setattr(mtp, "GRAPH_SAFE", frozenset(NAMES))
    log = set_full_graphs(None)
    assert captured(dispatcher(sizes=sizes, drafted=drafted)) == (
        both if drafted in (1, 2, 3) else piecewise
    )
    if drafted > 3:
        assert log.info_once.call_args.args[-1].endswith(f" with {drafted} drafted tokens")
    set_full_graphs("always")
    assert captured(dispatcher(sizes=sizes, drafted=drafted)) == both
    # Where vLLM's own kernels run, the number does not matter.
    set_full_graphs(None)
    choose((9, 0), None)
    assert captured(dispatcher(sizes=sizes, drafted=drafted)) == both


def test_every_operation_is_declared_safe():
    from vllm_sm12x.adapters import mtp

    assert set(NAMES) == mtp.GRAPH_SAFE
    assert {1, 2, 3} == mtp.GRAPH_SAFE_DRAFTS


@pytest.mark.parametrize("setting", ["auto", "never"])
@pytest.mark.parametrize(
    ("model_type", "method"),
    [("deepseek_v3", "mtp"), ("deepseek_v4", "eagle3"), ("deepseek_v4", None)],
)
def test_other_models_and_draft_methods_keep_their_graphs(
    choose, set_full_graphs, setting, model_type, method
):
    choose((12, 0), None)
    set_full_graphs(setting)
    assert captured(dispatcher(model_type=model_type, method=method)) == BOTH


@pytest.mark.parametrize("setting", ["auto", "never", "always"])
def test_full_decode_only_is_honoured_with_a_warning(choose, set_full_graphs, setting):
    choose((12, 0), None)
    log = set_full_graphs(setting)
    assert captured(dispatcher("FULL_DECODE_ONLY")) == {"FULL": SIZES}
    assert log.warning_once.called == (setting != "always")
    if setting != "always":
        text = log.warning_once.call_args.args[0] % log.warning_once.call_args.args[1:]
        assert "FULL_DECODE_ONLY" in text
        assert ("SM12X_MTP_FULL_GRAPHS=never" if setting == "never" else "mqa_logits") in text
    log.info_once.assert_not_called()


@pytest.mark.parametrize("mode", ["PIECEWISE", "NONE"])
@pytest.mark.parametrize("setting", ["auto", "never", "always"])
def test_modes_without_full_graphs_are_left_alone(choose, set_full_graphs, mode, setting):
    choose((12, 0), None)
    log = set_full_graphs(setting)
    assert captured(dispatcher(mode)) == (PIECEWISE if mode == "PIECEWISE" else {})
    log.warning_once.assert_not_called()
    log.info_once.assert_not_called()


@pytest.mark.parametrize("requests", range(1, 9))
def test_every_decode_batch_finds_a_piecewise_graph(choose, set_full_graphs, requests):
    from vllm.config import CUDAGraphMode

    choose((12, 0), None)
    mode, desc = dispatcher().dispatch(3 * requests, uniform_decode=True)
    assert mode == CUDAGraphMode.PIECEWISE
    assert desc.num_tokens == min(size for size in SIZES if size >= 3 * requests)
    assert desc.num_reqs is None and not desc.uniform


@pytest.mark.parametrize("value", ["1", "on", "Never", "auto,never"])
def test_another_value_is_refused(monkeypatch, value):
    pytest.importorskip("vllm")
    from vllm_sm12x.adapters import mtp

    message = f"SM12X_MTP_FULL_GRAPHS='{value}' is not allowed; allowed: auto, never, always"
    with pytest.raises(ValueError, match=message):
        mtp.setting.parse(value)


def test_a_bad_value_stops_the_import(cuda, monkeypatch):
    from vllm_sm12x.adapters import mtp

    monkeypatch.setenv("SM12X_MTP_FULL_GRAPHS", "sometimes")
    with pytest.raises(ValueError, match="SM12X_MTP_FULL_GRAPHS='sometimes' is not allowed"):
        importlib.reload(mtp)
    monkeypatch.delenv("SM12X_MTP_FULL_GRAPHS")
    importlib.reload(mtp)
