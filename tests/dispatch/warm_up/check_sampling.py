"""No option of a request makes anything of sampling compile after the warm-up.

Options are drawn, and vLLM's own runner samples for them. Triton's kernels are told apart by their
keys; what ``torch.compile`` compiles is counted, on the CPU, without what comes after its graphs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest

# Before vLLM: it makes vLLM believe in a GPU.
import sampling
import torch
from launch_keys import Keys, recorded
from torch._dynamo.utils import counters

from vllm_sm12x.adapters import warm_up, warm_up_sampling
from vllm_sm12x.ops import compile_orders, launching
from vllm_sm12x.ops.compile_orders import Order

CAPABILITY = (12, 0)
GRAMMAR = {"apply_token_bitmask_inplace_kernel"}
LIKELY = {"_topk_topp_kernel"}
SPREAD = {"expand_kernel"}
REJECTION = {
    "rejection_greedy_sample_kernel",
    "rejection_random_sample_kernel",
    "sample_recovered_tokens_kernel",
}
# Of the runner, before sampling.
SLOTS = {"_compute_slot_mapping_kernel"}


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Iterator[None]:
    with sampling.gpu(), patch.object(warm_up, "load", lambda kernels: None):
        yield


def keys_asked(worker: SimpleNamespace, drafted: int) -> Keys:
    caller = sampling.Sampling(worker)
    with recorded(CAPABILITY) as keys, torch.compiler.set_stance("force_eager"):
        for step in sampling.steps(20261123, drafted):
            caller.make(step)
    return keys


def keys_made(worker: SimpleNamespace) -> Keys:
    with recorded(CAPABILITY) as keys, torch.compiler.set_stance("force_eager"):
        warm_up.warm_up_kernels(worker)
    return keys


def kernels_missed(asked: Keys, made: Keys) -> set[str]:
    return {text.partition(":")[0] for text in asked.missing_from(made)}


@pytest.mark.parametrize("flashinfer", ["0", "1"])
@pytest.mark.parametrize("drafted", [0, 1, 2, 3])
def test_no_option_compiles(tmp_path, monkeypatch, drafted, flashinfer):
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", flashinfer)
    worker = sampling.start(tmp_path, drafted, "meta")
    asked, made = keys_asked(worker, drafted), keys_made(worker)
    kernels = GRAMMAR | LIKELY | (SPREAD | REJECTION if drafted else set())
    assert asked.kernels == kernels | SLOTS
    assert asked.missing_from(made) == []
    # Nor does the warm-up compile what no request asks for.
    unasked = made.missing_from(asked)
    assert [text for text in unasked if text.partition(":")[0] in kernels] == []


def test_no_option_compiles_with_probable_drafts(tmp_path):
    worker = sampling.start(tmp_path, 2, "meta", draft_sample_method="probabilistic")
    asked, made = keys_asked(worker, 2), keys_made(worker)
    assert asked.missing_from(made) == []
    with patch.object(worker.vllm_config.speculative_config, "draft_sample_method", "greedy"):
        made = keys_made(worker)
    assert kernels_missed(asked, made) == REJECTION - {"rejection_greedy_sample_kernel"}


@pytest.fixture(scope="module")
def with_drafts(gpu, tmp_path_factory) -> tuple[SimpleNamespace, Keys]:
    """A worker with two drafts, and what its steps ask for."""
    worker = sampling.start(tmp_path_factory.mktemp("model"), 2, "meta")
    return worker, keys_asked(worker, 2)


@pytest.mark.parametrize(
    ("left_out", "missed"),
    [
        ("_apply_grammar", GRAMMAR),
        ("_keep_likely", LIKELY),
        ("_spread_options", SPREAD),
        ("_reject", REJECTION),
    ],
)
def test_what_is_left_out_is_missed(with_drafts, left_out, missed):
    worker, asked = with_drafts
    with patch.object(warm_up_sampling, left_out, lambda *arguments: None):
        made = keys_made(worker)
    assert kernels_missed(asked, made) == missed


@pytest.mark.parametrize(
    ("kept", "missed"),
    [
        (lambda n: n % 16 != 0, GRAMMAR | LIKELY),
        (lambda n: n < 2 or n % 16 == 0, GRAMMAR | LIKELY),
        (lambda n: n != 1, GRAMMAR),  # One row is sorted: vLLM has no kernel for it.
    ],
    ids=["multiples", "others", "one"],
)
def test_a_form_that_is_left_out_is_missed(with_drafts, kept, missed):
    worker, asked = with_drafts

    def forgetful(numbers, kind):
        return list(filter(kept, launching.one_of_each(numbers, kind)))

    with patch.object(warm_up_sampling, "one_of_each", forgetful):
        made = keys_made(worker)
    assert kernels_missed(asked, made) == missed


def ordered(worker: SimpleNamespace) -> list[Order]:
    """What is ordered before the weights are loaded."""
    worker.local_rank = 0
    orders: list[Order] = []
    with (
        patch.object(warm_up, "_order", lambda worker, made, **limits: orders.extend(made)),
        patch.object(worker, "get_model", Mock()) as model,
        recorded(CAPABILITY),
    ):
        warm_up.compile_sampling_ahead(worker)
    model.assert_not_called()
    return orders


@pytest.mark.parametrize("drafted", [0, 2])
def test_every_form_of_top_k_and_top_p_is_ordered(tmp_path, drafted):
    worker = sampling.start(tmp_path, drafted, "meta")
    asked = keys_asked(worker, drafted)
    orders = ordered(worker)
    assert {order.name for order in orders} == LIKELY
    forms = [text for text in asked.found.values() if text.partition(":")[0] in LIKELY]
    assert len(orders) == len(forms)


def test_another_process_compiles_a_form_that_is_found_here(with_drafts, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    order = ordered(with_drafts[0])[1]  # top-k alone, which takes little time
    assert not order.is_compiled()
    compile_orders.write(tmp_path, [order])
    subprocess.run(
        [sys.executable, "-m", compile_orders.__name__, str(tmp_path)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=True,
    )
    assert list(compile_orders.results(tmp_path)) == [("_topk_topp_kernel", "")]
    assert order.is_compiled()


def test_what_a_process_imports_for_it_is_little_of_vllm():
    """Else each process would spend its time with imports (compile_orders.OTHERS)."""
    script = (
        "import importlib, sys\n"
        "for module in sys.argv[1:]: importlib.import_module(module)\n"
        "print(sum(name.startswith('vllm.') for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *sorted(compile_orders.OTHERS)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    # All of vLLM's engine is a thousand and more.
    assert int(done.stdout.split()[-1]) < 60


def graphs(worker: SimpleNamespace, drafted: int) -> int:
    """Compilations by ``torch.compile`` in steps, and in reading prompts."""
    most = worker.scheduler_config.max_num_seqs
    caller = sampling.Sampling(worker)
    before = counters["stats"]["unique_graphs"]
    with recorded(CAPABILITY):
        for number, step in enumerate(sampling.steps(20261123, drafted, most)):
            # Top-k would read what kernels, which nobody launches here, write.
            options = tuple(
                {name: one[name] for name in one if name not in ("top_k", "top_p")}
                | {"logprobs": number % 3}
                for one in step.options
            )
            caller.make(sampling.Step(options, step.drafts, before=step.before))
            if number % 8 == 0:
                caller.read(1 + number, number % 3)
    return counters["stats"]["unique_graphs"] - before


@pytest.fixture
def on_cpu(monkeypatch) -> None:
    """``torch.compile`` asks more of a GPU than is faked. What goes to one is a new tensor."""
    to = torch.Tensor.to

    def to_another(tensor: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        return to(tensor, *arguments, **options, **({"copy": True} if "device" in options else {}))

    monkeypatch.setattr(torch.Tensor, "to", to_another)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.compiler.reset()


@pytest.mark.parametrize("drafted", [0, 1, 3])
def test_no_option_makes_torch_compile(tmp_path, on_cpu, drafted):
    worker = sampling.start(tmp_path, drafted, "cpu", vocab_size=1024)
    assert worker.model_runner.use_async_spec_decode == (drafted > 0)
    warm_up_sampling.call_compiled_functions(worker)
    assert graphs(worker, drafted) == 0


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_few_requests_make_torch_compile_nothing(tmp_path, on_cpu, most):
    """Sizes that are often equal; compiled for that, a graph does not serve unlike ones."""
    worker = sampling.start(tmp_path, 1, "cpu", vocab_size=1024, most=most)
    warm_up_sampling.call_compiled_functions(worker)
    assert graphs(worker, 1) == 0


@pytest.mark.parametrize("left_out", ["_rank", "_correct_lengths"])
def test_a_function_that_is_not_called_compiles(tmp_path, on_cpu, left_out):
    worker = sampling.start(tmp_path, 1, "cpu", vocab_size=1024)
    with patch.object(warm_up_sampling, left_out, Mock()):
        warm_up_sampling.call_compiled_functions(worker)
    assert graphs(worker, 1) > 0


def test_the_warm_up_calls_them(tmp_path):
    worker = sampling.start(tmp_path, 1, "meta")
    with patch.object(warm_up, "call_compiled_functions") as call:
        keys_made(worker)
        call.assert_called_once_with(worker)
        worker.use_v2_model_runner = True
        keys_made(worker)
        call.assert_called_once_with(worker)


def test_the_runners_buffers_are_left_alone(tmp_path, on_cpu):
    worker = sampling.start(tmp_path, 1, "cpu", vocab_size=1024)
    runner = worker.model_runner
    buffers = (
        runner.num_computed_tokens,
        runner.num_accepted_tokens.gpu,
        runner.prev_positions.gpu,
        runner.prev_num_draft_tokens.gpu,
    )
    for number, buffer in enumerate(buffers):
        buffer.fill_(17 + number)
    warm_up_sampling.call_compiled_functions(worker)
    for number, buffer in enumerate(buffers):
        assert buffer.tolist() == [17 + number] * len(buffer)


def test_compiled_kernels_are_kept(tmp_path, monkeypatch):
    """Compiled for real, by threads, from launches in vLLM's code; then each is there."""
    from triton import knobs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    calls = warm_up.Calls(frozenset(), CAPABILITY)
    calls.add_always(warm_up_sampling._spread_options, 129_280)
    calls.add_always(warm_up_sampling._apply_grammar, 64, 129_280, torch.bfloat16)
    with recorded(CAPABILITY):
        knobs.runtime.jit_cache_hook = None
        kernels = warm_up.compile_kernels(calls)
        # Options of two types; all rows or some, in three forms of their number.
        assert len(kernels) == 2 + 2 * 3
        assert all(kernel.asm["cubin"][:4] == b"\x7fELF" for kernel in kernels)
        compiled = []
        knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(event["fn"].name)
        assert {id(kernel) for kernel in warm_up.compile_kernels(calls)} == set(map(id, kernels))
        assert compiled == []
