"""After the engine's warm-up no step of serving makes a kernel compile.

The warm-up finds its shapes on vLLM's own model; the steps call through the patched vLLM and the
adapters, our kernels and upstream's helpers around them. A key that a step asks for and warm-up did
not make is a compilation while serving.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import Mock, patch

import flash_engine
import pytest
import torch

from vllm_sm12x import implementation

# Form and device as on a GPU. Before the operations bind it.
implementation.choose = lambda operation, asked, on_gpu: asked or "triton"

from drafting import every_step  # noqa: E402
from launch_keys import Keys, recorded  # noqa: E402
from steps import Caller, Step, steps  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from vllm.config import CompilationMode  # noqa: E402

from vllm_sm12x import dispatch  # noqa: E402
from vllm_sm12x.adapters import warm_up  # noqa: E402
from vllm_sm12x.ops import compile_orders  # noqa: E402

CAPABILITY = (12, 0)
OURS = {
    "compress_kernel",
    "einsum_kernel",
    "halve_kernel",
    "mix_kernel",
    "finish_kernel",
    "post_kernel",
    "product_kernel",
    "weighted_sum_kernel",
    "local_experts_kernel",
    "split_kernel",
    "_combine_kernel",
    "prefill_kernel",
    "logits_kernel",
    "paged_logits_kernel",
}
HELPERS = {
    "_build_c128a_topk_metadata_kernel",
    "_build_prefill_chunk_metadata_kernel",
    "_combine_topk_swa_indices_kernel",
    "_compressed_slot_mapping_kernel",
    "_compute_global_topk_indices_and_lens_kernel",
    "_compute_prefill_metadata_kernel",
    "_dequantize_and_gather_k_kernel",
    "_fused_inv_rope_fp8_quant_per_head",
    "_fused_indexer_q_rope_quant_kernel",
    "_fused_kv_compress_norm_rope_insert_indexer_attn",
    "_fused_kv_compress_norm_rope_insert_sparse_attn",
    "_fused_q_kv_rmsnorm_kernel",
    "_save_partial_states_kernel",
}
RUNNER = {
    "_compute_slot_mapping_kernel",
    "eagle_prepare_inputs_padded_kernel",
    "eagle_prepare_next_token_padded_kernel",
    "eagle_step_slot_mapping_metadata_kernel",
}
# More of sampling is in check_sampling.py.
REJECTION = {
    "rejection_greedy_sample_kernel",
    "rejection_random_sample_kernel",
    "sample_recovered_tokens_kernel",
}
# Kernels by the operation whose calls are left out.
KERNELS_OF = {
    "cutedsl": {"compress_kernel"},
    "sparse_mla_decode": {"split_kernel", "_combine_kernel"},
    "sparse_mla_prefill": {"prefill_kernel"},
    "mqa_logits": {"logits_kernel"},
    "paged_mqa_logits": {"paged_logits_kernel"},
    "fp8_einsum": {"einsum_kernel"},
    "mhc": {"halve_kernel", "mix_kernel", "finish_kernel", "post_kernel"},
    "mxfp4_experts": {
        "halve_kernel",
        "product_kernel",
        "weighted_sum_kernel",
        "local_experts_kernel",
    },
}


@pytest.fixture(scope="module", params=[2, 8], ids=lambda tp: f"tp{tp}")
def engine(request, tmp_path_factory) -> flash_engine.Engine:
    return flash_engine.start(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def asked(engine) -> Keys:
    caller = Caller(engine)
    with recorded(CAPABILITY) as keys:
        for step in steps(seed=20261123):
            caller.make(step)
        every_step(engine.worker)
    return keys


@pytest.fixture
def gpu() -> Iterator[None]:
    """What the warm-up asks of torch; nothing is there to be loaded."""
    properties = SimpleNamespace(multi_processor_count=188, gcnArchName="")
    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),
        patch.object(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
        patch.object(warm_up, "load", lambda kernels: None),
        patch.object(warm_up, "call_compiled_functions", lambda worker: None),
    ):
        yield


def warmed_up(engine: flash_engine.Engine) -> Keys:
    """What the whole warm-up makes: the compilations, and the dummy runs as vLLM cuts them."""
    worker, caller = engine.worker, Caller(engine)
    worker.scheduler_config = engine.config.scheduler_config
    worker.model_runner._dummy_run = Mock()
    with recorded(CAPABILITY) as keys:
        warm_up.warm_up_kernels(worker)
        warm_up.warm_up_mixed_batch(worker)
        ((tokens,), how), _ = worker.model_runner._dummy_run.call_args_list
        assert (how["force_attention"], how["create_mixed_batch"]) == (True, True)
        # Half of the tokens decode, and one prompt has the others.
        caller.make(Step((1,) * (tokens // 2), (tokens - tokens // 2,)))
    return keys


@pytest.fixture
def without_caches(engine) -> Iterator[list[torch.nn.Module]]:
    """The layers of the engine as they are when the weights are there and nothing else."""
    layers = [
        layer
        for layer in engine.config.compilation_config.static_forward_context.values()
        if hasattr(layer, "kv_cache")
    ]
    assert len(layers) > 5
    caches = [layer.kv_cache for layer in layers]
    for layer in layers:
        layer.kv_cache = torch.tensor([])
    yield layers
    for layer, cache in zip(layers, caches, strict=True):
        layer.kv_cache = cache


def ordered(engine: flash_engine.Engine) -> set[compile_orders.Order]:
    operations = warm_up.portable_operations() & warm_up.kernel_operations()
    with recorded(CAPABILITY):
        return set(warm_up.orders_of(engine.worker, operations, CAPABILITY))


def test_all_kernels_of_ours_are_ordered_before_there_is_a_cache(engine, without_caches):
    early = ordered(engine)
    assert all(layer.kv_cache.numel() == 0 for layer in without_caches), "left without memory"
    flash_engine.give_caches(engine.config)
    assert early == ordered(engine)
    assert {order.name for order in early} == OURS


def test_no_step_compiles(engine, asked, gpu):
    made = warmed_up(engine)
    assert asked.kernels == OURS | HELPERS | RUNNER | REJECTION
    assert asked.missing_from(made) == []


def test_the_compilations_alone_cover_our_kernels(engine, asked, gpu):
    with recorded(CAPABILITY) as made:
        warm_up.warm_up_kernels(engine.worker)
    missing = {text.partition(":")[0] for text in asked.missing_from(made)}
    assert missing == HELPERS - {"_compute_prefill_metadata_kernel"}


@pytest.mark.parametrize("operation", sorted(KERNELS_OF))
def test_an_operation_that_is_left_out_is_missed(engine, asked, gpu, operation):
    kept = frozenset(KERNELS_OF) - {operation}
    with patch.object(warm_up, "kernel_operations", lambda: kept):
        made = warmed_up(engine)
    # The mixed batch reaches some forms of a kernel; of those with one form, all.
    names = {text.partition(":")[0] for text in asked.missing_from(made)}
    assert names <= KERNELS_OF[operation]
    alone = {"compress_kernel", "prefill_kernel", "logits_kernel", "paged_logits_kernel"}
    assert names or KERNELS_OF[operation] <= alone


def test_the_runner_is_missed(engine, asked, gpu):
    with patch.object(warm_up, "add_runner", lambda calls, worker: None):
        made = warmed_up(engine)
    assert {text.partition(":")[0] for text in asked.missing_from(made)} == RUNNER


def test_what_is_decoded_at_most(engine):
    limits = warm_up.limits_of(engine.config)
    assert (limits.tokens, limits.decode_tokens) == (8192, 64 * 3)
    assert limits.expert_tokens == 8192
    wide = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=100, max_num_seqs=90),
        num_speculative_tokens=0,
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=[1, 96]),
        parallel_config=SimpleNamespace(data_parallel_size=4),
    )
    assert warm_up.limits_of(wide) == warm_up.Limits(100, 96, 400)
    wide.num_speculative_tokens = 1
    assert warm_up.limits_of(wide).decode_tokens == 100


def test_the_logits_are_what_sampling_is_warmed_up_for(engine, monkeypatch):
    """Their dtype is the model's, and rows are as far apart as the padded vocabulary."""
    from vllm.model_executor.layers import logits_processor
    from vllm.model_executor.layers.vocab_parallel_embedding import pad_vocab_size

    ranks = engine.config.parallel_config.tensor_parallel_size
    monkeypatch.setattr(
        logits_processor,
        "tensor_model_parallel_all_gather",
        lambda part: torch.cat([part] * ranks, dim=-1),
    )
    config = engine.config.model_config
    for rows in (1, 3):
        logits = engine.model.compute_logits(torch.zeros(rows, 4096, dtype=config.dtype))
        assert (logits.dtype, logits.shape) == (config.dtype, (rows, config.get_vocab_size()))
        assert (logits.stride(0), logits.stride(1)) == (pad_vocab_size(config.get_vocab_size()), 1)


@pytest.mark.parametrize("one_token", [True, False])
def test_no_number_of_tokens_makes_the_embedding_compile(engine, gpu, monkeypatch, one_token):
    from vllm.model_executor.layers import vocab_parallel_embedding as layer

    worker = engine.worker
    worker.scheduler_config = engine.config.scheduler_config
    run = worker.model_runner._dummy_run = Mock()
    warm_up.warm_up_mixed_batch(worker)
    # On the CPU from here on, and without the other ranks.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(layer, "tensor_model_parallel_all_reduce", lambda part: part)
    torch.compiler.reset()
    embedding = engine.model.model.embed_tokens
    ids = torch.zeros(40, dtype=torch.int32)

    def embed(counts: list[int]) -> int:
        before = counters["stats"]["unique_graphs"]
        with torch.inference_mode():
            for count in counts:
                embedding(ids[:count])
        return counters["stats"]["unique_graphs"] - before

    calls = run.call_args_list if one_token else run.call_args_list[:1]
    assert embed([call.args[0] for call in calls]) == len(calls)
    assert embed(list(range(1, 41))) == (not one_token)


def worker_of(model_type: str, mode: CompilationMode) -> SimpleNamespace:
    hf_config = SimpleNamespace(model_type=model_type)
    model_config = SimpleNamespace(hf_config=hf_config, max_model_len=4096)
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            model_config=model_config, compilation_config=SimpleNamespace(mode=mode)
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=4096),
        model_runner=SimpleNamespace(_dummy_run=Mock()),
        get_model=Mock(),
    )


@pytest.mark.parametrize(
    ("model_type", "portable"), [("deepseek_v3", "all"), ("deepseek_v4", "none")]
)
def test_others_are_left_alone(gpu, monkeypatch, model_type, portable):
    monkeypatch.setenv("SM12X_PORTABLE", portable)
    dispatch.clear_cache()
    worker = worker_of(model_type, CompilationMode.NONE)
    with recorded(CAPABILITY) as keys:
        warm_up.warm_up_kernels(worker)
        warm_up.warm_up_mixed_batch(worker)
    monkeypatch.undo()
    dispatch.clear_cache()
    assert keys.found == {}
    worker.get_model.assert_not_called()
    worker.model_runner._dummy_run.assert_not_called()


@pytest.mark.parametrize(
    ("step", "model_len", "tokens"), [(4096, 4096, [16]), (7, 4096, [7]), (64, 9, [8]), (1, 1, [])]
)
@pytest.mark.parametrize("mode", [CompilationMode.VLLM_COMPILE, CompilationMode.NONE])
def test_the_mixed_batch_fits_the_engine(gpu, step, model_len, tokens, mode):
    worker = worker_of("deepseek_v4", mode)
    worker.scheduler_config.max_num_batched_tokens = step
    worker.vllm_config.model_config.max_model_len = model_len
    warm_up.warm_up_mixed_batch(worker)
    one = [1] if tokens and mode == CompilationMode.NONE else []
    assert [call.args[0] for call in worker.model_runner._dummy_run.call_args_list] == tokens + one


def test_the_second_runner_warms_itself_up(gpu):
    worker = worker_of("deepseek_v4", CompilationMode.NONE)
    worker.use_v2_model_runner = True
    warm_up.warm_up_mixed_batch(worker)
    worker.model_runner._dummy_run.assert_not_called()


def test_compiled_kernels_are_kept(engine, tmp_path, monkeypatch):
    """Compiled for real, by threads; then every launch finds its kernel."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import knobs

    only = frozenset({"fp8_einsum"})
    with recorded(CAPABILITY), patch.object(warm_up, "add_sampling", lambda calls, worker: None):
        knobs.runtime.jit_cache_hook = None
        calls = warm_up.calls_of(engine.worker, only, CAPABILITY)
        kernels = warm_up.compile_kernels(calls)
        # The einsum's five configurations; upstream's kernels for powers of two from 1 to 64
        # requests, and for three forms of numbers: slots in blocks of 64 and 256 and in those of 4
        # and 8 tokens, drafting's preparation, its next tokens (1, 2 or 3), and its steps.
        assert len(kernels) == 5 + 7 + 3 * (2 + 1 + 3 + 1)
        assert all(kernel.asm["cubin"][:4] == b"\x7fELF" for kernel in kernels)
        compiled = []
        knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(event["fn"].name)
        assert {id(kernel) for kernel in warm_up.compile_kernels(calls)} == set(map(id, kernels))
        assert compiled == []


def test_one_line_says_what_was_done(engine, gpu, caplog):
    logging.getLogger("vllm").propagate = True
    with recorded(CAPABILITY), caplog.at_level(logging.INFO):
        warm_up.warm_up_kernels(engine.worker)
    (line,) = [entry.getMessage() for entry in caplog.records if "Triton kernels" in entry.message]
    assert re.fullmatch(
        r"Compiled and loaded \d+ Triton kernels in \d+\.\d s, of .*sparse_mla_prefill", line
    )
