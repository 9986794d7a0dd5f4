"""Which drafting passes are captured whole, and which ones are replayed."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def module(monkeypatch):
    """The module, with the setting as nobody set it."""
    from vllm_sm12x.adapters import draft_graphs, mtp

    monkeypatch.delenv("SM12X_DRAFT_GRAPHS", raising=False)
    monkeypatch.delenv("SM12X_MTP_FULL_GRAPHS", raising=False)
    draft_graphs.setting.cache_clear()
    mtp.clear_cache()
    yield draft_graphs
    draft_graphs.setting.cache_clear()
    mtp.clear_cache()


@pytest.fixture
def set_drafts(module, monkeypatch):
    def set_variable(value: str) -> None:
        monkeypatch.setenv("SM12X_DRAFT_GRAPHS", value)
        module.setting.cache_clear()

    return set_variable


class Wrapper:
    """Stands for vLLM's CUDAGraphWrapper: captures at the first call, then replays."""

    def __init__(self, model, vllm_config, runtime_mode):
        self.model, self.mode = model, runtime_mode
        self.concrete_cudagraph_entries = {}
        self.replays = []

    def __call__(self, **inputs):
        from vllm.forward_context import get_forward_context

        context = get_forward_context()
        assert context.cudagraph_runtime_mode is self.mode
        descriptor = context.batch_descriptor
        if descriptor not in self.concrete_cudagraph_entries:
            self.concrete_cudagraph_entries[descriptor] = self.model(**inputs)
        else:
            self.replays.append(descriptor)
        return f"graph of {descriptor.num_tokens} tokens, {descriptor.num_reqs} requests"


class Model:
    """Says in which mode it was run."""

    name = "draft model"

    def __init__(self):
        self.modes = []

    def __call__(self, **inputs):
        from vllm.forward_context import get_forward_context

        self.modes.append(get_forward_context().cudagraph_runtime_mode.name)
        return "model"


class Memory:
    """Buffers of an engine, and passes that lie in them."""

    def __init__(self):
        self.input_ids = torch.zeros(32, dtype=torch.int32)
        self.positions = torch.zeros(32, dtype=torch.int64)
        self.hidden_states = torch.zeros(32, 8)
        self.slots, self.own_slots = (torch.zeros(32, dtype=torch.int64) for _ in range(2))
        self.indices = torch.zeros(32, 1, 16, dtype=torch.int32)
        self.lens = torch.zeros(32, dtype=torch.int32)

    def inputs(self, padded: int) -> dict[str, torch.Tensor | None]:
        return {
            "input_ids": self.input_ids[:padded],
            "positions": self.positions[:padded],
            "inputs_embeds": None,
            "hidden_states": self.hidden_states[:padded],
        }

    def metadata(self, requests: int, tokens: int, prompts: int = 0) -> object:
        from vllm.v1.attention.backends.mla.sparse_swa import DeepseekSparseSWAMetadata

        slots = self.slots if tokens > requests else self.own_slots
        return DeepseekSparseSWAMetadata(
            block_table=torch.zeros(requests, 4, dtype=torch.int32),
            slot_mapping=slots[:tokens],
            block_size=64,
            decode_swa_indices=self.indices[:tokens],
            decode_swa_lens=self.lens[:tokens],
            num_decodes=requests,
            num_decode_tokens=tokens,
            num_prefills=prompts,
        )


@contextmanager
def forward(metadata: object, mode: str = "PIECEWISE"):
    """vLLM's forward context of a pass."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import ForwardContext, override_forward_context

    context = ForwardContext(
        no_compile_layers={},
        attn_metadata=metadata,
        slot_mapping={},
        cudagraph_runtime_mode=CUDAGraphMode[mode],
        batch_descriptor="the step's",
    )
    with override_forward_context(context):
        yield context
    assert context.cudagraph_runtime_mode is CUDAGraphMode[mode]
    assert context.batch_descriptor == "the step's"


@pytest.fixture
def graphs(module, monkeypatch):
    """Passes of one and two requests, of three tokens each and of one, captured."""
    monkeypatch.setattr(module, "CUDAGraphWrapper", Wrapper)
    memory, model = Memory(), Model()
    made = module.DraftGraphs(model, None)
    made.memory = memory
    for requests in (2, 1):
        # Padded to whole requests, as vLLM's sizes are with MTP=2.
        for tokens in (3 * requests, requests):
            with forward({"layer": memory.metadata(requests, tokens)}, "NONE"):
                made.capture(**memory.inputs(3 * requests))
    assert model.modes == ["NONE", "FULL"] * 4
    model.modes.clear()
    return made


def run(graphs: object, requests: int, tokens: int, padded: int, **how: int) -> str:
    with forward({"layer": graphs.memory.metadata(requests, tokens, **how)}):
        return graphs(**graphs.memory.inputs(padded))


@pytest.mark.parametrize(
    ("requests", "tokens", "padded"), [(1, 3, 3), (1, 1, 3), (2, 6, 6), (2, 2, 6)]
)
def test_a_pass_like_a_captured_one_is_replayed(graphs, requests, tokens, padded):
    """Also where both passes of a request have as many tokens with padding."""
    assert len(graphs) == 4
    assert len(graphs._graphs.concrete_cudagraph_entries) == 4
    graphs.memory.input_ids.fill_(9)
    assert run(graphs, requests, tokens, padded) == f"graph of {padded} tokens, {requests} requests"
    assert (graphs.replayed, graphs.model.modes) == (1, [])
    (replayed,) = graphs._graphs.replays
    assert replayed.uniform == (tokens > requests)


@pytest.mark.parametrize(
    ("numbers", "how"),
    [((3, 3, 3), {}), ((2, 4, 6), {}), ((2, 6, 8), {}), ((2, 6, 6), {"prompts": 1})],
    ids=["requests", "tokens", "padding", "a prompt"],
)
def test_other_numbers_run_the_model(graphs, numbers, how):
    assert run(graphs, *numbers, **how) == "model"
    assert (graphs.replayed, graphs.model.modes) == (0, ["PIECEWISE"])


@pytest.mark.parametrize(
    "moved", ["input_ids", "positions", "hidden_states", "slots", "indices", "lens"]
)
def test_what_lies_elsewhere_runs_the_model(graphs, moved):
    """The graph would read what the step before left."""
    setattr(graphs.memory, moved, getattr(graphs.memory, moved).clone())
    assert run(graphs, 2, 6, 6) == "model"
    assert graphs.replayed == 0


def test_inputs_that_a_graph_has_not_run_the_model(graphs):
    with forward({"layer": graphs.memory.metadata(2, 6)}):
        embedded = graphs.memory.inputs(6) | {"inputs_embeds": torch.zeros(6, 8)}
        assert graphs(**embedded) == "model"


def test_passes_without_attention_or_with_another_run_the_model(graphs):
    """vLLM's dummy runs, and layers that are no window."""
    inputs = graphs.memory.inputs(6)
    for metadata in (None, {}, [{}], {"layer": graphs.memory.metadata(2, 6), "other": object()}):
        with forward(metadata):
            assert graphs(**inputs) == "model"
        with forward(metadata), pytest.raises(ValueError, match=r"^attn_metadata: "):
            graphs.capture(**inputs)
    assert len(graphs) == 4


def test_cleared_graphs_run_the_model(graphs):
    graphs._graphs.concrete_cudagraph_entries.clear()
    assert run(graphs, 2, 6, 6) == "model"


def test_the_models_attributes_are_there(graphs):
    assert graphs.name == "draft model"
    with pytest.raises(AttributeError):
        _ = graphs.nothing


def test_the_context_is_as_before_after_an_error(graphs, monkeypatch):
    def broken(wrapper, **inputs):
        raise RuntimeError("broken")

    monkeypatch.setattr(Wrapper, "__call__", broken)
    with (
        forward({"layer": graphs.memory.metadata(2, 6)}) as context,
        pytest.raises(RuntimeError, match="broken"),
    ):
        graphs(**graphs.memory.inputs(6))
    assert context.batch_descriptor == "the step's"
    assert context.cudagraph_runtime_mode.name == "PIECEWISE"


def runner(**changes: object) -> SimpleNamespace:
    """A model runner of an engine that drafts two tokens for up to eight requests."""
    from vllm.config import CUDAGraphMode

    facts = {
        "model_type": "deepseek_v4",
        "method": "mtp",
        "drafted": 2,
        "mode": CUDAGraphMode.FULL_AND_PIECEWISE,
        "data_parallel_size": 1,
        "lora_config": None,
        "enforce_eager": False,
        "max_num_seqs": 8,
        "max_num_tokens": 4096,
        "largest": 24,
    } | changes
    compilation = SimpleNamespace(
        cudagraph_mode=facts["mode"], max_cudagraph_capture_size=facts["largest"]
    )
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type=facts["model_type"])),
            speculative_config=SimpleNamespace(
                method=facts["method"],
                num_speculative_tokens=facts["drafted"],
                enforce_eager=facts["enforce_eager"],
            ),
            compilation_config=compilation,
            parallel_config=SimpleNamespace(data_parallel_size=facts["data_parallel_size"]),
            lora_config=facts["lora_config"],
        ),
        compilation_config=compilation,
        scheduler_config=SimpleNamespace(max_num_seqs=facts["max_num_seqs"]),
        max_num_tokens=facts["max_num_tokens"],
        drafter=SimpleNamespace(model=Model(), num_speculative_tokens=facts["drafted"]),
    )


@pytest.fixture
def captured(module, monkeypatch):
    """Captures a runner's passes and gives them: requests and tokens of each."""
    monkeypatch.setattr(module, "CUDAGraphWrapper", Wrapper)

    def capture(made: SimpleNamespace) -> list[tuple[int, int]]:
        passes, memory = [], Memory()

        @contextmanager
        def one(_, requests, query_len):
            passes.append((requests, query_len))
            tokens = requests * query_len
            with forward({"layer": memory.metadata(requests, tokens)}, "NONE"):
                yield memory.inputs(tokens)

        monkeypatch.setattr(module, "_pass", one)
        module.capture_draft_graphs(made)
        return passes

    return capture


@pytest.mark.parametrize("value", ["on", "AUTO", "auto,never"])
def test_a_bad_setting_is_refused(module, value):
    with pytest.raises(ValueError) as error:
        module.setting.parse(value)
    assert str(error.value) == (
        f"SM12X_DRAFT_GRAPHS={value!r} is not allowed; allowed: auto, never, always"
    )


def test_passes_of_every_number_of_requests_are_captured(choose, set_drafts, captured):
    choose((12, 0), None)
    set_drafts("always")
    made = runner(max_num_seqs=3)
    model = made.drafter.model
    assert captured(made) == [(3, 3), (3, 1), (2, 3), (2, 1), (1, 3), (1, 1)]
    assert made.drafter.model.model is model
    # Captured again, it is the model that is captured.
    captured(made)
    assert made.drafter.model.model is model


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ({}, 8),
        ({"max_num_seqs": 100, "largest": 512}, 32),
        ({"largest": 14}, 4),
        ({"max_num_tokens": 7}, 2),
    ],
)
def test_as_many_requests_as_graphs_and_steps_have(choose, set_drafts, captured, limits, most):
    choose((12, 0), None)
    set_drafts("always")
    passes = captured(runner(**limits))
    assert [requests for requests, query_len in passes if query_len == 3] == [*range(most, 0, -1)]


def test_with_one_draft_there_is_one_pass(choose, set_drafts, captured):
    choose((12, 0), None)
    set_drafts("always")
    assert captured(runner(drafted=1, max_num_seqs=2)) == [(2, 2), (1, 2)]


def test_auto_captures_what_was_shown(choose, module, captured, monkeypatch):
    choose((12, 0), None)
    monkeypatch.setattr(module, "SHOWN_DRAFTS", frozenset({2}))
    assert captured(runner(max_num_seqs=1)) == [(1, 3), (1, 1)]
    assert captured(runner(max_num_seqs=1, drafted=3)) == []


@pytest.mark.parametrize(("drafted", "passes"), [(1, 1), (2, 2), (3, 2), (4, 0)])
def test_what_was_shown_is_the_default(choose, module, captured, drafted, passes):
    choose((12, 0), None)
    assert {1, 2, 3} == module.SHOWN_DRAFTS
    assert len(captured(runner(max_num_seqs=1, drafted=drafted))) == passes


@pytest.mark.operation("sparse_mla_decode")
def test_only_with_our_decode(case, choose, set_drafts, captured):
    choose(case.capability, case.override)
    set_drafts("always")
    assert bool(captured(runner(max_num_seqs=1))) == case.portable


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "deepseek_v3"},
        {"method": "eagle"},
        {"enforce_eager": True},
        {"mode": "PIECEWISE"},
        {"mode": "NONE"},
        {"data_parallel_size": 2},
        {"lora_config": object()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_not_where_a_pass_is_more_than_its_numbers(choose, set_drafts, captured, change):
    from vllm.config import CUDAGraphMode

    choose((12, 0), None)
    set_drafts("always")
    if "mode" in change:
        change = {"mode": CUDAGraphMode[change["mode"]]}
    made = runner(**change)
    assert captured(made) == []
    assert isinstance(made.drafter.model, Model)


def test_not_where_full_graphs_of_decode_are_left_out(
    choose, set_drafts, captured, monkeypatch, module
):
    from vllm_sm12x.adapters import mtp

    choose((12, 0), None)
    set_drafts("always")
    monkeypatch.setenv("SM12X_MTP_FULL_GRAPHS", "never")
    mtp.clear_cache()
    assert captured(runner()) == []
    set_drafts("never")
    monkeypatch.delenv("SM12X_MTP_FULL_GRAPHS")
    mtp.clear_cache()
    assert captured(runner()) == []
