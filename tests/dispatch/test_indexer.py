"""The sparse-attention indexer: logits of prefill and decode, the schedule, the constructor."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch


def fp8(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator).to(torch.float8_e4m3fn)


def score(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Logits of one token, in float64: q ``[H, D]``, weights ``[H]``, keys ``[N, D]``."""
    dots = (q.double() @ keys.double().T).clamp_min(0)
    return (weights.double() @ dots) * scale.double()


@pytest.mark.operation("mqa_logits")
@pytest.mark.parametrize("clean", [True, False])
def test_prefill_logits(portable, clean, monkeypatch):
    from vllm.utils import deep_gemm

    native = Mock(return_value=object())
    monkeypatch.setattr(deep_gemm, "_fp8_fp4_mqa_logits_impl", native)
    generator = torch.Generator().manual_seed(5)
    q, k = fp8(generator, 3, 32, 128), fp8(generator, 6, 128)
    k_scale = torch.rand(6, generator=generator) + 0.5
    weights = torch.randn(3, 32, generator=generator)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    ends = torch.tensor([2, 1, 6], dtype=torch.int32)
    query, keys = (q, None), (k, k_scale)
    logits = deep_gemm.fp8_fp4_mqa_logits(query, keys, weights, starts, ends, clean)
    if not portable:
        native.assert_called_once_with(query, keys, weights, starts, ends, clean_logits=clean)
        assert logits is native.return_value
        return
    native.assert_not_called()
    assert logits.dtype == torch.float32
    for token in range(3):
        inside = torch.zeros(6, dtype=torch.bool)
        inside[starts[token] : ends[token]] = True
        expected = score(q[token], weights[token], k, k_scale)
        torch.testing.assert_close(
            logits[token][inside].double(), expected[inside], rtol=1e-4, atol=1e-3
        )
        if clean:
            assert (logits[token][~inside] == -torch.inf).all()


@pytest.mark.operation("paged_mqa_logits")
def test_decode_logits(portable, monkeypatch):
    from vllm.utils import deep_gemm

    native = Mock(return_value=object())
    monkeypatch.setattr(deep_gemm, "_fp8_fp4_paged_mqa_logits_impl", native)
    generator = torch.Generator().manual_seed(6)
    keys = fp8(generator, 3, 64, 128)
    scales = torch.rand(3, 64, generator=generator) + 0.5
    # A page: 64 keys, then their 64 scales.
    cache = torch.cat(
        [keys.view(torch.uint8).flatten(1), scales.view(torch.uint8).flatten(1)], 1
    ).view(3, 64, 1, 132)
    q = fp8(generator, 2, 1, 32, 128)
    weights = torch.randn(2, 32, generator=generator)
    lens = torch.tensor([[5], [70]], dtype=torch.int32)
    table = torch.tensor([[1, 0], [2, 0]], dtype=torch.int32)
    schedule = torch.zeros(4, 2, dtype=torch.int32)
    query = (q, None)
    logits = deep_gemm.fp8_fp4_paged_mqa_logits(
        query, cache, weights, lens, table, schedule, 96, True
    )
    if not portable:
        native.assert_called_once_with(
            query, cache, weights, lens, table, schedule, 96, clean_logits=True
        )
        assert logits is native.return_value
        return
    native.assert_not_called()
    assert logits.shape == (2, 96)
    for request in range(2):
        pages = table[request].long()
        own_keys, own_scales = keys[pages].flatten(0, 1), scales[pages].flatten()
        length = int(lens[request, 0])
        expected = score(q[request, 0], weights[request], own_keys, own_scales)[:length]
        torch.testing.assert_close(
            logits[request, :length].double(), expected, rtol=1e-4, atol=1e-3
        )
        assert (logits[request, length:] == -torch.inf).all()


@pytest.mark.operation("mqa_logits", "paged_mqa_logits")
def test_an_fp4_query_is_refused_on_the_portable_path(portable, monkeypatch):
    from vllm.utils import deep_gemm

    monkeypatch.setattr(deep_gemm, "_fp8_fp4_mqa_logits_impl", Mock(return_value="native"))
    monkeypatch.setattr(deep_gemm, "_fp8_fp4_paged_mqa_logits_impl", Mock(return_value="native"))
    query = (torch.zeros(1, 4, 64, dtype=torch.uint8), torch.zeros(1, 4, dtype=torch.int32))
    anything = torch.zeros(1)
    prefill = (query, (anything, anything), anything, anything, anything, True)
    decode = (query, anything, anything, anything, anything, anything, 8, True)
    if portable:
        with pytest.raises(ValueError, match="q: an MXFP4 query .* came, allowed: .*e4m3"):
            deep_gemm.fp8_fp4_mqa_logits(*prefill)
        with pytest.raises(ValueError, match="q: an MXFP4 query .* came, allowed: .*e4m3"):
            deep_gemm.fp8_fp4_paged_mqa_logits(*decode)
    else:
        assert deep_gemm.fp8_fp4_mqa_logits(*prefill) == "native"
        assert deep_gemm.fp8_fp4_paged_mqa_logits(*decode) == "native"


UNTOUCHED = -7


def build_decode_metadata(module: object) -> object:
    """The real ``build()`` of the C4A indexer's metadata, for two decode requests."""
    builder = object.__new__(module.DeepseekV32IndexerMetadataBuilder)
    builder.reorder_batch_threshold = 1
    builder.num_speculative_tokens = 0
    builder.use_flattening = False
    builder.compress_ratio = 4
    builder.kv_cache_spec = SimpleNamespace(storage_block_size=64)
    builder.num_sms = 3
    builder.decode_lens_buffer = torch.zeros(8, dtype=torch.int32)
    builder.expanded_seq_lens_buffer = torch.zeros(8, dtype=torch.int32)
    builder.compressed_slot_mapping_buffer = torch.zeros(8, dtype=torch.int64)
    builder.scheduler_metadata_buffer = torch.full((4, 2), UNTOUCHED, dtype=torch.int32)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    common = SimpleNamespace(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor([9, 402], dtype=torch.int32),
        num_reqs=2,
        num_actual_tokens=2,
        max_query_len=1,
        max_seq_len=402,
        block_table_tensor=torch.tensor([[4, 0], [5, 6]], dtype=torch.int32),
        slot_mapping=torch.tensor([8, 401]),
    )
    return builder.build(0, common)


@pytest.mark.operation("paged_mqa_logits")
@pytest.mark.parametrize("installed", [True, False])
def test_the_schedule_of_decode(portable, installed, monkeypatch):
    from vllm.v1.attention.backends.mla import indexer

    plan = torch.arange(8, dtype=torch.int32).view(4, 2)
    schedule = Mock(return_value=plan)
    monkeypatch.setattr(indexer, "get_paged_mqa_logits_metadata", schedule)
    monkeypatch.setattr(indexer, "has_deep_gemm", lambda: installed)
    # A Triton kernel, not the subject here.
    monkeypatch.setattr(indexer, "get_compressed_slot_mapping", Mock())
    metadata = build_decode_metadata(indexer)
    # Either way: two requests, one token each, lengths in compressed entries.
    assert metadata.decode.seq_lens.tolist() == [[2], [100]]
    assert metadata.decode.block_table.tolist() == [[4, 0], [5, 6]]
    if installed and not portable:
        schedule.assert_called_once_with(metadata.decode.seq_lens, 64, 3)
        assert torch.equal(metadata.decode.schedule_metadata, plan)
    else:
        schedule.assert_not_called()
        assert (metadata.decode.schedule_metadata == UNTOUCHED).all()


def padded_decode_lengths(drafted: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Lengths that the real ``build()`` makes of three decoding requests in a graph for four."""
    from vllm.v1.attention.backends.mla import indexer

    monkeypatch.setattr(indexer, "get_paged_mqa_logits_metadata", Mock(return_value=0))
    monkeypatch.setattr(indexer, "get_compressed_slot_mapping", Mock())
    next_n = 1 + drafted
    builder = object.__new__(indexer.DeepseekV32IndexerMetadataBuilder)
    builder.reorder_batch_threshold = next_n
    builder.num_speculative_tokens = drafted
    builder.use_flattening = drafted > 1  # as the constructor chooses outside the SM100 family
    builder.compress_ratio = 4
    builder.kv_cache_spec = SimpleNamespace(storage_block_size=64)
    builder.num_sms = 3
    for name in ("decode_lens", "decode_seq_lens", "expanded_seq_lens"):
        # What an earlier, longer batch left there.
        setattr(builder, f"{name}_buffer", torch.full((32,), -9, dtype=torch.int32))
    builder.arange_buffer = torch.arange(32, dtype=torch.int32)
    builder.offsets_buffer = torch.arange(next_n, dtype=torch.int32)
    builder.expanded_block_table_buffer = torch.zeros(32, 2, dtype=torch.int32)
    builder.compressed_slot_mapping_buffer = torch.zeros(32, dtype=torch.int64)
    builder.scheduler_metadata_buffer = torch.zeros(4, 2, dtype=torch.int32)
    starts = torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32) * next_n
    common = SimpleNamespace(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor([next_n, 9, 402, 0], dtype=torch.int32),
        num_reqs=4,
        num_actual_tokens=4 * next_n,
        max_query_len=next_n,
        max_seq_len=402,
        block_table_tensor=torch.tensor([[4, 0], [5, 0], [6, 7], [0, 0]], dtype=torch.int32),
        slot_mapping=torch.arange(4 * next_n),
    )
    return builder.build(0, common).decode.seq_lens.tolist()


@pytest.mark.operation("paged_mqa_logits")
def test_padding_rows_have_no_length_below_zero(portable, monkeypatch):
    # A token sees an entry for each four of the tokens up to itself.
    lengths = padded_decode_lengths(1, monkeypatch)
    assert lengths[:3] == [[0, 0], [2, 2], [100, 100]]
    # Upstream's has -1 there: as an unsigned number 4,294,967,295 keys.
    assert lengths[3] == ([0, 0] if portable else [-1, 0])


@pytest.mark.operation("paged_mqa_logits")
@pytest.mark.parametrize(
    ("drafted", "expected"),
    [(2, [0, 0, 0, 1, 2, 2, 100, 100, 100]), (3, [0, 0, 0, 1, 1, 1, 2, 2, 99, 100, 100, 100])],
)
def test_flattened_padding_rows_have_length_zero(portable, monkeypatch, drafted, expected):
    lengths = padded_decode_lengths(drafted, monkeypatch)
    assert lengths == [[length] for length in expected + [0] * (1 + drafted)]


def make_indexer(monkeypatch: pytest.MonkeyPatch, installed: bool) -> object:
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers import sparse_attn_indexer

    monkeypatch.setattr(sparse_attn_indexer, "has_deep_gemm", lambda: installed)
    # It asks the engine's compilation settings, which are not the subject here.
    monkeypatch.setattr(CustomOp, "dispatch_forward", lambda self, compile_native: None)
    return sparse_attn_indexer.SparseAttnIndexer(
        k_cache=None,
        quant_block_size=128,
        scale_fmt="ue8m0",
        topk_tokens=512,
        head_dim=128,
        max_model_len=4096,
        max_total_seq_len=4096,
        topk_indices_buffer=torch.zeros(1),
    )


@pytest.mark.operation("mqa_logits", "paged_mqa_logits")
def test_the_layer_is_built_without_deep_gemm_on_the_portable_path_alone(portable, monkeypatch):
    make_indexer(monkeypatch, installed=True)
    if portable:
        assert make_indexer(monkeypatch, installed=False).topk_tokens == 512
    else:
        with pytest.raises(RuntimeError, match="requires DeepGEMM to be installed"):
            make_indexer(monkeypatch, installed=False)


@pytest.mark.parametrize("override", ["mqa_logits", "paged_mqa_logits"])
def test_half_of_the_indexer_still_needs_deep_gemm(choose, override, monkeypatch):
    choose((12, 0), override)
    with pytest.raises(RuntimeError, match="requires DeepGEMM to be installed"):
        make_indexer(monkeypatch, installed=False)
