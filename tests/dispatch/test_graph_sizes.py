"""For which sizes of batches CUDA graphs are captured when the user lists none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


def dispatcher(
    max_num_seqs: int,
    drafted: int,
    model_type: str = "deepseek_v4",
    **compilation_options: object,
) -> object:
    """vLLM's dispatcher, with the sizes that vLLM's configuration comes to."""
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    mode = CUDAGraphMode.FULL_AND_PIECEWISE
    compilation = CompilationConfig(
        cudagraph_mode=mode, mode=CompilationMode.VLLM_COMPILE, **compilation_options
    )
    compilation.set_splitting_ops_for_v1(all2all_backend="naive", data_parallel_size=1)
    drafting = SimpleNamespace(method="mtp", num_speculative_tokens=drafted) if drafted else None
    config = SimpleNamespace(
        compilation_config=compilation,
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=4096),
        model_config=SimpleNamespace(
            enforce_eager=False, hf_config=SimpleNamespace(model_type=model_type)
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        speculative_config=drafting,
        num_speculative_tokens=drafted,
        lora_config=None,
        performance_mode="balanced",
    )
    VllmConfig._set_cudagraph_sizes(config)
    compilation.adjust_cudagraph_sizes_for_spec_decode(1 + drafted, tensor_parallel_size=1)
    compilation.post_init_cudagraph_sizes()
    made = CudagraphDispatcher(config)
    made.initialize_cudagraph_keys(mode, 1 + drafted)
    return made


def without_full_graph(made: object, max_num_seqs: int, drafted: int) -> list[int]:
    """Numbers of requests that decode at once on no full graph."""
    from vllm.config import CUDAGraphMode

    return [
        requests
        for requests in range(1, max_num_seqs + 1)
        if made.dispatch(requests * (1 + drafted), uniform_decode=True)[0] != CUDAGraphMode.FULL
    ]


@pytest.mark.parametrize("drafted", [0, 1, 2, 3])
@pytest.mark.parametrize("max_num_seqs", [*range(1, 14), 16, 20, 31, 32, 40])
def test_however_many_decode_there_is_a_full_graph(choose, max_num_seqs, drafted):
    choose((12, 0), None)
    made = dispatcher(max_num_seqs, drafted)
    assert without_full_graph(made, max_num_seqs, drafted) == []


# By hand. With two drafts vLLM's list goes on with 48, 57, 66: 17 and 18 requests have 51 and 54.
@pytest.mark.parametrize(
    ("max_num_seqs", "drafted", "sizes"),
    [
        (4, 2, [3, 6, 9, 12]),
        (8, 2, [3, 6, 9, 12, 15, 18, 21, 24]),
        (18, 2, [*range(3, 49, 3), 54]),
        (6, 1, [2, 4, 6, 8, 10, 12]),
        (8, 0, [1, 2, 3, 4, 5, 6, 7, 8]),
        (28, 0, [*range(1, 17), 24, 28]),
    ],
)
def test_few_requests_decode_without_padding(choose, max_num_seqs, drafted, sizes):
    choose((12, 0), None)
    made = dispatcher(max_num_seqs, drafted)
    decoding = max_num_seqs * (1 + drafted)
    captured = made.compilation_config.cudagraph_capture_sizes
    assert [size for size in captured if size <= decoding] == sizes
    padded = {
        requests: made.dispatch(requests * (1 + drafted), uniform_decode=True)[1].num_tokens
        for requests in range(1, min(max_num_seqs, 16) + 1)
    }
    assert padded == {requests: requests * (1 + drafted) for requests in padded}


# By hand: the list 1, 2, 4, 8, 16, 24, to multiples of three.
@pytest.mark.parametrize(
    ("capability", "model_type"), [((9, 0), "deepseek_v4"), ((12, 0), "deepseek_v3")]
)
def test_elsewhere_the_list_is_vllms(choose, capability, model_type):
    choose(capability, None)
    made = dispatcher(4, 2, model_type)
    assert made.compilation_config.cudagraph_capture_sizes == [3, 6, 9, 18, 24]
    assert without_full_graph(made, 4, 2) == [4]


def test_what_the_user_lists_is_kept(choose):
    choose((12, 0), None)
    made = dispatcher(4, 2, cudagraph_capture_sizes=[3, 6])
    assert made.compilation_config.cudagraph_capture_sizes == [3, 6]


def test_no_graph_is_larger_than_the_user_allows(choose):
    choose((12, 0), None)
    made = dispatcher(4, 2, max_cudagraph_capture_size=8)
    assert made.compilation_config.cudagraph_capture_sizes == [3, 6]


def test_vllms_bound_holds(choose):
    # 256 requests of three tokens: 768, and vLLM captures no graph for more than 512.
    choose((12, 0), None)
    made = dispatcher(256, 2)
    assert made.compilation_config.cudagraph_capture_sizes[-1] <= 512
