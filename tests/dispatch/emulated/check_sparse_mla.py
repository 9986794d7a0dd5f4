"""``PortableSparseMLAImpl`` end to end: vLLM's metadata and Triton helpers, our attention.

What the layer gets is made as the engine makes it: the window's and C128A's indices, the gather
lengths and the gathered keys by vLLM's own kernels. What it must give is computed from each token's
position alone, in float64: which keys it sees, and the softmax over them with the sink.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from vllm.models.deepseek_v4.nvidia import flashmla
from vllm.v1.attention.backends.mla import flashmla_sparse, sparse_swa

from vllm_sm12x import dispatch
from vllm_sm12x.adapters import sparse_mla as adapter
from vllm_sm12x.ops import mqa_logits, paged_mqa_logits

HEADS, DIM, NOPE, ROPE = 8, 512, 448, 64
WINDOW, TOPK = 32, 16
MAX_MODEL_LEN, MAX_TOKENS = 1024, 64
SWA_BLOCK, PAGE = 64, 256
SCALE = DIM**-0.5


class Cache:
    """A paged ``fp8_ds_mla`` cache with random tokens; ``latents`` holds their values.

    A page: 576 bytes a token (448 e4m3, 64 bfloat16), then 8 bytes a token (7 exponents), padded to
    a multiple of 576. Page 0 is the null page: NaN in every token, so that who reads it is seen.
    """

    def __init__(self, pages: int, rows: int, generator: torch.Generator) -> None:
        stride = -(-rows * 584 // 576) * 576
        storage = torch.full((pages * stride,), 0xFF, dtype=torch.uint8)
        self.tensor = storage.as_strided((pages, rows, 584), (stride, 584, 1))
        data = storage.as_strided((pages, rows, 576), (stride, 576, 1))
        scales = storage.as_strided((pages, rows, 8), (stride, 8, 1), rows * 576)
        nope = torch.randn(pages, rows, NOPE, generator=generator).to(torch.float8_e4m3fn)
        rope = torch.randn(pages, rows, ROPE, generator=generator).to(torch.bfloat16)
        exponents = torch.randint(125, 129, (pages, rows, 7), generator=generator)
        data[1:, :, :NOPE] = nope.view(torch.uint8)[1:]
        data[1:, :, NOPE:] = rope.view(torch.uint8).view(pages, rows, 2 * ROPE)[1:]
        scales[1:, :, :7] = exponents.to(torch.uint8)[1:]
        factor = torch.pow(2.0, exponents.double() - 127).repeat_interleave(64, -1)
        self.latents = torch.cat([nope.double() * factor, rope.double()], -1)
        self.rows = rows

    def read(self, table: torch.Tensor, positions: list[int]) -> torch.Tensor:
        pages = [int(table[position // self.rows]) for position in positions]
        assert 0 not in pages
        return torch.stack(
            [
                self.latents[page, position % self.rows]
                for page, position in zip(pages, positions, strict=True)
            ]
        )


class Batch:
    """Requests as (tokens before this step, tokens in it), decodes first."""

    def __init__(
        self,
        ratio: int,
        decodes: list[tuple[int, int]],
        prefills: list[tuple[int, int]],
        padding: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(97 * ratio + len(decodes) + 7 * len(prefills))
        self.ratio = ratio
        requests = decodes + prefills
        query_lens = [query for _, query in requests] + [1] * padding
        seq_lens = [prefix + query for prefix, query in requests] + [0] * padding
        num_decodes = len(decodes) + padding
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        num_tokens = int(starts[-1])
        decode_tokens = int(starts[num_decodes])
        real_tokens = sum(query for _, query in requests)
        # Every token's request and position; None for padding.
        self.tokens: list[tuple[int, int] | None] = [
            (request, prefix + offset)
            for request, (prefix, query) in enumerate(requests)
            for offset in range(query)
        ] + [None] * padding
        slots = torch.tensor([1] * real_tokens + [-1] * padding)

        self.swa = Cache(80, SWA_BLOCK, generator)
        self.swa_table = self._table(seq_lens, query_lens, SWA_BLOCK, 80, WINDOW, generator)
        self.compressed = self.table = None
        if ratio > 1:
            self.compressed = Cache(40, PAGE // ratio, generator)
            self.table = self._table(seq_lens, query_lens, PAGE, 40, None, generator)

        self.topk = torch.full((MAX_TOKENS, TOPK), -1, dtype=torch.int32)
        for row, token in enumerate(self.tokens):
            if ratio == 4 and token is not None:
                entries = torch.randperm((token[1] + 1) // 4, generator=generator)[:TOPK]
                self.topk[row, : len(entries)] = entries.int()
        self.sink = torch.full((64,), -torch.inf)
        self.sink[:HEADS] = torch.randn(HEADS, generator=generator)
        self.q = torch.randn(num_tokens, HEADS, DIM, generator=generator).to(torch.bfloat16)

        token_to_request = torch.repeat_interleave(
            torch.arange(len(query_lens)), torch.tensor(query_lens)
        ).int()
        lengths = torch.tensor(seq_lens, dtype=torch.int32)
        valid = slots >= 0
        window_indices = torch.full((MAX_TOKENS, 1, WINDOW), 1 << 30, dtype=torch.int32)
        window_lens = torch.full((MAX_TOKENS,), 1 << 30, dtype=torch.int32)
        if decode_tokens:
            sparse_swa._compute_swa_indices_and_lens_kernel[(decode_tokens,)](
                window_indices,
                window_indices.stride(0),
                window_lens,
                WINDOW,
                starts,
                lengths,
                token_to_request,
                valid,
                self.swa_table,
                self.swa_table.stride(0),
                SWA_BLOCK,
                TRITON_BLOCK_SIZE=1024,
            )
        builder = object.__new__(sparse_swa.DeepseekSparseSWAMetadataBuilder)
        builder.window_size = WINDOW
        builder._layer_types = {"swaonly", "c4a", "c128a"}
        prefill_fields = builder._build_deepseek_v4_metadata(
            num_decodes, len(prefills), lengths, starts
        )
        schedule = builder.build_tile_scheduler(decode_tokens)
        self.swa_metadata = sparse_swa.DeepseekSparseSWAMetadata(
            block_table=self.swa_table,
            slot_mapping=slots,
            block_size=SWA_BLOCK,
            seq_lens=lengths,
            query_start_loc=starts,
            query_start_loc_cpu=starts.clone(),
            is_valid_token=valid,
            token_to_req_indices=token_to_request,
            decode_swa_indices=window_indices[:decode_tokens],
            decode_swa_lens=window_lens[:decode_tokens],
            num_decodes=num_decodes,
            num_prefills=len(prefills),
            num_decode_tokens=decode_tokens,
            num_prefill_tokens=num_tokens - decode_tokens,
            tile_sched_swaonly=schedule["swaonly"],
            tile_sched_c4a=schedule["c4a"],
            tile_sched_c128a=schedule["c128a"],
            **prefill_fields,
        )
        self.metadata = None
        if ratio > 1:
            fields = {}
            if ratio == 128:
                positions = torch.tensor([token[1] if token else 0 for token in self.tokens])
                width = 128
                decode_indices, decode_lens, prefill_indices = (
                    flashmla_sparse.build_c128a_topk_metadata(
                        positions,
                        128,
                        decode_tokens,
                        token_to_request,
                        self.table[:num_decodes],
                        PAGE // 128,
                        slots,
                        torch.full((MAX_TOKENS, width), 1 << 30, dtype=torch.int32),
                        torch.full((MAX_TOKENS,), 1 << 30, dtype=torch.int32),
                        torch.full((MAX_TOKENS, width), 1 << 30, dtype=torch.int32),
                        max_compressed_tokens=width,
                    )
                )
                if decode_tokens:
                    fields["c128a_global_decode_topk_indices"] = decode_indices.view(
                        decode_tokens, 1, -1
                    )
                    fields["c128a_decode_topk_lens"] = decode_lens
                if prefills:
                    fields["c128a_prefill_topk_indices"] = prefill_indices
            self.metadata = flashmla_sparse.FlashMLASparseMetadata(
                num_reqs=len(query_lens),
                max_query_len=max(query_lens),
                max_seq_len=max(seq_lens),
                num_actual_tokens=num_tokens,
                query_start_loc=starts,
                slot_mapping=slots,
                block_table=self.table,
                req_id_per_token=token_to_request,
                block_size=PAGE,
                topk_tokens=TOPK,
                **fields,
            )
        self.layer = SimpleNamespace(
            compress_ratio=ratio,
            prefix="attention",
            kv_cache=torch.tensor([]) if self.compressed is None else self.compressed.tensor,
            swa_cache_layer=SimpleNamespace(prefix="window", kv_cache=self.swa.tensor),
            topk_indices_buffer=self.topk,
            attn_sink=self.sink,
            scale=SCALE,
            window_size=WINDOW,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=MAX_TOKENS,
        )

    @staticmethod
    def _table(
        seq_lens: list[int],
        query_lens: list[int],
        block: int,
        pages: int,
        window: int | None,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Pages of every request, in no order; the null page for blocks that the window left."""
        free = (torch.randperm(pages - 1, generator=generator) + 1).tolist()
        table = torch.zeros(len(seq_lens), MAX_MODEL_LEN // block, dtype=torch.int32)
        for request, (length, query) in enumerate(zip(seq_lens, query_lens, strict=True)):
            first = 0 if window is None else max(0, length - query - window + 1) // block
            for column in range(first, -(-length // block)):
                table[request, column] = free.pop()
        return table

    def run(self, monkeypatch: pytest.MonkeyPatch, impl: type | None = None) -> torch.Tensor:
        context = {"window": self.swa_metadata}
        if self.metadata is not None:
            context["attention"] = self.metadata
        use_context(monkeypatch, context)
        out = torch.full_like(self.q, float("nan"))
        (impl or adapter.PortableSparseMLAImpl).forward_mqa(
            self.layer, self.q, None, torch.zeros(len(self.q)), out
        )
        return out

    def expected(self) -> torch.Tensor:
        out = torch.zeros(len(self.tokens), HEADS, DIM, dtype=torch.float64)
        for row, token in enumerate(self.tokens):
            if token is None:
                continue
            request, position = token
            seen = list(range(max(0, position - WINDOW + 1), position + 1))
            keys = self.swa.read(self.swa_table[request], seen)
            if self.ratio == 4:
                entries = [entry for entry in self.topk[row].tolist() if entry >= 0]
            elif self.ratio == 128:
                entries = list(range((position + 1) // 128))
            else:
                entries = []
            if entries:
                keys = torch.cat([keys, self.compressed.read(self.table[request], entries)])
            weights = torch.exp(self.q[row].double() @ keys.T * SCALE)
            total = weights.sum(-1) + torch.exp(self.sink[:HEADS].double())
            out[row] = weights @ keys / total.unsqueeze(-1)
        return out


class NaNWorkspace:
    """The engine's workspace with NaN in it: what nobody gathered must not be read."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def get_simultaneous(self, *wanted: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
        self.shapes += [shape for shape, _ in wanted]
        return [torch.full(shape, float("nan"), dtype=dtype) for shape, dtype in wanted]


def use_context(monkeypatch: pytest.MonkeyPatch, metadata: dict[str, object] | None) -> None:
    context = SimpleNamespace(attn_metadata=metadata, batch_descriptor=None)
    for module in (flashmla, adapter):
        monkeypatch.setattr(module, "get_forward_context", lambda: context)


@pytest.fixture(autouse=True)
def workspace(monkeypatch):
    manager = NaNWorkspace()
    for module in (flashmla, adapter):
        monkeypatch.setattr(module, "current_workspace_manager", lambda: manager)
    return manager


@pytest.fixture
def native(monkeypatch):
    """FlashMLA's two kernels, which must not be reached from the portable halves."""
    kernels = SimpleNamespace(
        decode=Mock(return_value=(None, None)),
        prefill=Mock(),
        schedule=Mock(return_value=("plan",)),
    )
    monkeypatch.setattr(flashmla, "flash_mla_with_kvcache", kernels.decode)
    monkeypatch.setattr(flashmla, "flash_mla_sparse_fwd", kernels.prefill)
    monkeypatch.setattr(sparse_swa, "get_mla_metadata", kernels.schedule)
    return kernels


def choose(monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    monkeypatch.setenv("SM12X_PORTABLE", override)
    dispatch.clear_cache()


@pytest.fixture(autouse=True)
def everything_portable(monkeypatch):
    choose(monkeypatch, "all")
    yield
    dispatch.clear_cache()


# Short and long contexts, on both sides of a page and of a 128-token compression, and (for
# decodes) two tokens at a time, as with a draft token.
DECODES = [(299, 1), (126, 2), (4, 1), (511, 1)]
# More than one chunk of four; fresh prompts, and continued ones.
PREFILLS = [(0, 5), (0, 40), (126, 3), (254, 4), (60, 6), (640, 3)]
BATCHES = {
    "decodes": (DECODES, [], 0),
    "padded decodes": (DECODES, [], 2),
    "prefills": ([], PREFILLS, 0),
    "four prefills": ([], PREFILLS[:4], 0),
    "mixed": (DECODES[:2], PREFILLS[:1] + PREFILLS[2:], 0),
}
RATIOS = {"window": 1, "C4A": 4, "C128A": 128}


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 2 % of each head's vector; one lost key of these batches changes it by far more."""
    assert not actual.isnan().any()
    distance = (actual.double() - expected).norm(dim=-1)
    assert (distance <= 0.02 * expected.norm(dim=-1)).all()


@pytest.mark.parametrize(
    ("kind", "batch"),
    [(kind, batch) for kind in RATIOS for batch in BATCHES if batch != "four prefills"]
    + [("window", "four prefills")],
)
def test_attention_equals_the_definition(kind, batch, native, workspace, monkeypatch):
    decodes, prefills, padding = BATCHES[batch]
    given = Batch(RATIOS[kind], decodes, prefills, padding)
    untouched = [given.topk.clone(), given.swa_table.clone(), given.swa.tensor.clone()]
    assert_near(given.run(monkeypatch), given.expected())
    for before, after in zip(
        untouched, (given.topk, given.swa_table, given.swa.tensor), strict=True
    ):
        assert torch.equal(before, after)
    assert not native.decode.called
    assert not native.prefill.called
    assert not native.schedule.called
    # The workspace that the profiling run reserved, and no other.
    ratio = RATIOS[kind]
    rows = (0 if ratio == 1 else MAX_MODEL_LEN // ratio) + WINDOW + MAX_TOKENS
    assert workspace.shapes == ([(4, rows, DIM)] if prefills else [])


@pytest.mark.parametrize("kind", list(RATIOS))
def test_only_decode_portable(kind, native, monkeypatch):
    choose(monkeypatch, "sparse_mla_decode,cutedsl")
    decodes, prefills, _ = BATCHES["mixed"]
    given = Batch(RATIOS[kind], decodes, prefills)
    out, tokens = given.run(monkeypatch), given.swa_metadata.num_decode_tokens
    assert_near(out[:tokens], given.expected()[:tokens])
    assert out[tokens:].isnan().all()
    assert not native.decode.called
    assert not native.schedule.called
    # Five prefills are two chunks.
    first, second = (call.kwargs for call in native.prefill.call_args_list)
    queries = sum(query for _, query in prefills[:4])
    assert torch.equal(first["q"], given.q[tokens : tokens + queries])
    assert torch.equal(second["q"], given.q[tokens + queries :])
    assert second["out"].data_ptr() == out[tokens + queries :].data_ptr()
    assert second["attn_sink"] is given.sink


@pytest.mark.parametrize("kind", list(RATIOS))
def test_only_prefill_portable(kind, native, monkeypatch):
    choose(monkeypatch, "sparse_mla_prefill,cutedsl")
    decodes, prefills, _ = BATCHES["mixed"]
    given = Batch(RATIOS[kind], decodes, prefills)
    out, tokens = given.run(monkeypatch), given.swa_metadata.num_decode_tokens
    assert_near(out[tokens:], given.expected()[tokens:])
    assert out[:tokens].isnan().all()
    assert not native.prefill.called
    (call,) = native.decode.call_args_list
    assert torch.equal(call.kwargs["q"], given.q[:tokens].unsqueeze(1))
    assert call.kwargs["out"].data_ptr() == out.data_ptr()
    # Upstream's decode needs the schedule, one a kind of layer.
    assert call.kwargs["tile_scheduler_metadata"] == "plan"
    assert native.schedule.call_count == 3


@pytest.mark.parametrize("kind", list(RATIOS))
def test_both_drivers_call_the_prefill_kernel_alike(kind, native, monkeypatch):
    """The same keys, indices and lengths reach our kernel as reach FlashMLA's."""
    given = Batch(RATIOS[kind], *BATCHES["prefills"])
    ours = Mock()
    monkeypatch.setattr(adapter.sparse_mla, "sparse_mla_prefill", ours)
    given.run(monkeypatch)
    given.run(monkeypatch, flashmla.DeepseekV4FlashMLASparseImpl)
    assert ours.call_count == native.prefill.call_count == 2
    for mine, theirs in zip(ours.call_args_list, native.prefill.call_args_list, strict=True):
        q, keys, indices, lens, sink, scale, out = mine.args
        upstream = theirs.kwargs
        assert torch.equal(q, upstream["q"])
        assert torch.equal(indices, upstream["indices"].squeeze(1))
        assert torch.equal(lens, upstream["topk_length"])
        assert (sink, scale) == (upstream["attn_sink"], upstream["sm_scale"])
        assert out.shape == upstream["out"].shape
        used = torch.cat([row[:length] for row, length in zip(indices, lens, strict=True)]).unique()
        assert torch.equal(keys[used.long()], upstream["kv"].squeeze(1)[used.long()])
        assert not keys[used.long()].isnan().any()


# Width of the index tensor beside the window's, with DeepSeek V4 Flash's sizes: the indexer's
# choice, or every entry, padded to 128.
WIDTHS = {"window": 0, "C4A": 512, "C128A": 128}


@pytest.mark.parametrize("kind", list(RATIOS))
def test_the_profiling_run_takes_what_a_step_takes(kind, native, workspace, monkeypatch):
    layer = Batch(RATIOS[kind], DECODES[:1], []).layer
    layer.window_size = 128
    layer.topk_indices_buffer = torch.zeros(MAX_TOKENS, 512, dtype=torch.int32)
    # A C4A layer alone has an indexer, which runs beside the attention and needs room of its own.
    layer.indexer = SimpleNamespace(n_head=64, max_model_len=MAX_MODEL_LEN // 4)
    if kind != "C4A":
        layer.indexer = None
    use_context(monkeypatch, None)
    allocated = []
    real = torch.empty

    def empty(*args, **kwargs):
        tensor = real(*args, **{**kwargs, "device": "meta"})
        allocated.append(tensor.nbytes)
        return tensor

    q = torch.zeros(MAX_TOKENS, HEADS, DIM, dtype=torch.bfloat16)
    out = torch.full_like(q, float("nan"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        adapter.PortableSparseMLAImpl.forward_mqa(layer, q, None, None, out)
    assert (out == 0).all()
    ratio = RATIOS[kind]
    rows = (0 if ratio == 1 else MAX_MODEL_LEN // ratio) + 128 + MAX_TOKENS
    assert workspace.shapes == [(4, rows, DIM)]
    keys = 128 + WIDTHS[kind]
    needed = max(
        adapter.sparse_mla.decode_scratch_bytes(MAX_TOKENS, HEADS, keys),
        adapter.sparse_mla.prefill_scratch_bytes(MAX_TOKENS, HEADS, keys),
    )
    if kind == "C4A":
        pages = -(-(MAX_MODEL_LEN // 4) // 64)
        needed += max(
            mqa_logits.scratch_bytes(MAX_TOKENS, 64, MAX_MODEL_LEN // 4),
            paged_mqa_logits.scratch_bytes(MAX_TOKENS, 1, 64, pages, MAX_MODEL_LEN // 4),
        )
    assert max(allocated) >= needed > 0
