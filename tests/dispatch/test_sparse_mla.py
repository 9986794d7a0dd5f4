"""DeepSeek V4's sparse MLA: which implementation is chosen, and what it does.

The attention itself runs in ``emulated/check_sparse_mla.py``, with vLLM's helper kernels around it,
in a process whose vLLM has no faked GPU.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from child_checks import run_checks

HALVES = ("sparse_mla_decode", "sparse_mla_prefill")


@pytest.mark.operation(*HALVES)
def test_the_implementation_that_the_layer_selects(portable):
    from vllm.models.deepseek_v4 import attention
    from vllm.models.deepseek_v4.nvidia.flashmla import DeepseekV4FlashMLASparseImpl

    impl = attention._select_v4_sparse_impl()
    if portable:
        assert impl.__name__ == "PortableSparseMLAImpl"
        assert impl.__module__ == "vllm_sm12x.adapters.sparse_mla"
        # Same backend, so the same cache layout and metadata builders.
        assert issubclass(impl, DeepseekV4FlashMLASparseImpl)
        assert impl.backend_cls is DeepseekV4FlashMLASparseImpl.backend_cls
    else:
        assert impl is DeepseekV4FlashMLASparseImpl


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0), (12, 1)])
@pytest.mark.parametrize("override", HALVES)
def test_one_portable_half_is_enough_to_select_it(choose, capability, override):
    from vllm.models.deepseek_v4 import attention

    choose(capability, override)
    assert attention._select_v4_sparse_impl().__name__ == "PortableSparseMLAImpl"


def smallest(sizes: tuple[int, ...], heads: int) -> int:
    return min(size for size in sizes if size >= heads)


@pytest.mark.operation(*HALVES)
def test_padded_heads(portable):
    from vllm.models.deepseek_v4 import attention

    impl = attention._select_v4_sparse_impl()
    sizes = (8, 16, 32, 64, 128) if portable else (64, 128)
    for heads in range(1, 129):
        assert impl.get_padded_num_q_heads(heads) == smallest(sizes, heads), heads
    for heads in (129, 256):
        with pytest.raises(ValueError, match=str(heads)):
            impl.get_padded_num_q_heads(heads)


@pytest.mark.parametrize("override", HALVES)
def test_flashmlas_half_keeps_its_head_counts(choose, override):
    from vllm.models.deepseek_v4 import attention

    choose((12, 0), override)
    impl = attention._select_v4_sparse_impl()
    for heads in range(1, 129):
        assert impl.get_padded_num_q_heads(heads) == smallest((64, 128), heads)
    with pytest.raises(ValueError, match="129 heads"):
        impl.get_padded_num_q_heads(129)


@pytest.mark.parametrize(
    ("override", "handed_over"),
    [("sparse_mla_decode", "_forward_prefill"), ("sparse_mla_prefill", "_forward_decode")],
)
def test_the_other_half_is_handed_to_upstream_as_it_came(
    choose, override, handed_over, monkeypatch
):
    from vllm.models.deepseek_v4.nvidia.flashmla import DeepseekV4FlashMLASparseImpl

    from vllm_sm12x.adapters.sparse_mla import PortableSparseMLAImpl

    choose((9, 0), override)
    upstream = Mock()
    monkeypatch.setattr(DeepseekV4FlashMLASparseImpl, handed_over, upstream)
    names = {
        "_forward_prefill": (
            "layer",
            "q",
            "positions",
            "compressed_k_cache",
            "swa_k_cache",
            "output",
            "attn_metadata",
            "swa_metadata",
        ),
        "_forward_decode": (
            "layer",
            "q",
            "kv_cache",
            "swa_metadata",
            "attn_metadata",
            "swa_only",
            "output",
        ),
    }[handed_over]
    # Opaque: whoever looks into one of them fails.
    arguments = {name: object() for name in names}
    getattr(PortableSparseMLAImpl, handed_over)(**arguments)
    (call,) = upstream.call_args_list
    received = dict(zip(names, call.args, strict=False)) | call.kwargs
    assert received == arguments


@pytest.mark.parametrize(
    ("padded", "prefills", "expected"),
    [(12, 0, 12), (9, 0, 9), (None, 0, 9), (48, 1, 9), (6, 0, 9)],
)
def test_decode_chooses_for_the_batch_that_a_graph_is_padded_to(
    choose, padded, prefills, expected, monkeypatch
):
    from vllm.forward_context import BatchDescriptor, override_forward_context

    from vllm_sm12x.adapters import sparse_mla

    choose((12, 0), "auto")
    called = Mock()
    monkeypatch.setattr(sparse_mla.sparse_mla, "sparse_mla_decode", called)
    q, out = torch.zeros(9, 8, 512), torch.zeros(9, 8, 512)
    metadata = SimpleNamespace(
        num_decode_tokens=9,
        num_prefills=prefills,
        decode_swa_indices=torch.zeros(9, 128),
        decode_swa_lens=torch.zeros(9),
    )
    layer = SimpleNamespace(
        swa_cache_layer=SimpleNamespace(kv_cache=torch.zeros(0)), attn_sink=q, scale=1.0
    )
    descriptor = None if padded is None else BatchDescriptor(num_tokens=padded)
    with override_forward_context(SimpleNamespace(batch_descriptor=descriptor)):
        sparse_mla.PortableSparseMLAImpl._forward_decode(layer, q, None, metadata, None, True, out)
    assert called.call_args.kwargs["batch_tokens"] == expected


@pytest.mark.operation("sparse_mla_decode")
@pytest.mark.parametrize(
    "types",
    [{"swaonly"}, {"swaonly", "c4a"}, {"swaonly", "c4a", "c128a"}],
    ids=lambda types: "-".join(sorted(types)),
)
def test_the_schedule_of_decode(portable, types, monkeypatch):
    from vllm.v1.attention.backends.mla import sparse_swa

    plans = [object(), object(), object()]
    schedule = Mock(side_effect=[(plan, None) for plan in plans])
    monkeypatch.setattr(sparse_swa, "get_mla_metadata", schedule)
    builder = SimpleNamespace(_layer_types=types)
    build = sparse_swa.DeepseekSparseSWAMetadataBuilder.build_tile_scheduler
    nothing = {"swaonly": None, "c4a": None, "c128a": None}
    assert build(builder, 0) == nothing
    schedule.assert_not_called()
    result = build(builder, 2)
    if portable:
        schedule.assert_not_called()
        assert result == nothing
    else:
        # One fresh plan a kind of layer that the model has.
        assert schedule.call_count == len(types)
        assert set(result) == set(nothing)
        made = [result[kind] for kind in types]
        assert sorted(map(id, made)) == sorted(map(id, plans[: len(types)]))
        assert all(result[kind] is None for kind in nothing if kind not in types)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_attention_equals_the_definition():
    run_checks(Path(__file__).parent / "emulated", at_least=50, SM12X_PORTABLE="all")
