"""What steps of serving call of our operations, by vLLM's own code where it makes the arguments.

Tensors have no memory; what is sliced in a step begins where the step's requests begin.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

import torch
from flash_engine import DRAFTED, MAX_MODEL_LEN, MOST_REQUESTS, MOST_TOKENS, Engine

I32 = torch.int32
BLOCK = 256


@dataclass(frozen=True)
class Step:
    """Tokens of each decoding request and of each that is read, in this order in a batch."""

    decodes: tuple[int, ...]
    prefills: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.decodes) + sum(self.prefills)


def steps(seed: int) -> Iterator[Step]:
    """Decoding with and without drafts; prompts of all lengths; mixes of both."""
    draw = random.Random(seed)
    for requests in [*range(1, 18), 31, 32, 33, MOST_REQUESTS - 1, MOST_REQUESTS]:
        yield Step((1,) * requests, ())
        yield Step((1 + DRAFTED,) * requests, ())
    for tokens in [
        *range(1, 20),
        31,
        32,
        33,
        63,
        64,
        65,
        255,
        256,
        257,
        1023,
        1024,
        1025,
        MOST_TOKENS - 1,
        MOST_TOKENS,
    ]:
        yield Step((), (tokens,))
    for _ in range(60):
        decodes = draw.choices(range(1, 2 + DRAFTED), k=draw.randrange(MOST_REQUESTS // 2))
        room, prefills = MOST_TOKENS - sum(decodes), []
        for _ in range(draw.randrange(9)):
            most = draw.choice([4, 40, 1000, MOST_TOKENS])
            prefills.append(draw.randrange(1, min(most, room // 9) + 1))
        if decodes or prefills:
            yield Step(tuple(decodes), tuple(prefills))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


class Caller:
    """Makes an engine's calls."""

    def __init__(self, engine: Engine) -> None:
        config = engine.config.model_config.hf_config
        self.hidden, self.mult = config.hidden_size, config.hc_mult
        self.attentions = engine.modules("DeepseekV4MLAAttention")
        self.outers = _ends(engine.modules("DeepseekV4MultiHeadLatentAttentionWrapper"))
        self.indexers = engine.modules("DeepseekV4Indexer")
        self.compressors = [
            module
            for module in engine.modules("DeepseekV4MultiHeadLatentAttentionWrapper")
            if module.compressor is not None
        ]
        self.layers = _ends(engine.modules("DeepseekV4DecoderLayer"))
        self.heads = [
            module
            for model in (engine.model, engine.draft)
            for module in model.modules()
            if isinstance(getattr(module, "hc_head_fn", None), torch.Tensor)
        ]
        assert len(self.heads) == 2
        self.experts = _ends(engine.modules("FusedMoE"))
        self.topk = meta(MOST_TOKENS, 512, dtype=I32)
        width = -(-MAX_MODEL_LEN // 128 // 128) * 128
        self.all_compressed = meta(MOST_TOKENS, width, dtype=I32)
        self.table = meta(MOST_REQUESTS, MAX_MODEL_LEN // BLOCK + 3, dtype=I32)
        self.lengths = meta(MOST_REQUESTS + 1, dtype=I32)
        self.per_token = meta(MOST_TOKENS, dtype=I32)
        self.valid = meta(MOST_TOKENS, dtype=torch.bool)

    def make(self, step: Step) -> None:
        """What a step calls: for the metadata, then in the forward pass."""
        self._build(step)
        for module in self.outers:
            self._project(module, step.tokens)
        for module in self.compressors:
            self._compress(module, step)
        for layer in self.layers:
            self._mix(layer, step.tokens)
        for module in self.heads:
            self._collapse(module, step.tokens)
        for module in self.experts:
            self._route(module, step.tokens)
        for module in self.attentions:
            self._attend(module, step)
        for module in self.indexers:
            self._index(module, step)

    def _build(self, step: Step) -> None:
        from vllm.v1.attention.backends.mla import (
            compressor_utils,
            flashmla_sparse,
            indexer,
            sparse_swa,
        )

        decodes, prefills = len(step.decodes), len(step.prefills)
        requests, decoded = decodes + prefills, sum(step.decodes)
        starts = torch.tensor([0, *step.decodes, *step.prefills]).cumsum(0).int()
        seq_lens, table = self.lengths[:requests], self.table[:requests]
        sparse_swa.DeepseekSparseSWAMetadataBuilder._build_deepseek_v4_metadata(
            SimpleNamespace(window_size=128),
            decodes,
            prefills,
            seq_lens,
            self.lengths[: requests + 1],
        )
        flashmla_sparse.build_c128a_topk_metadata(
            meta(MOST_TOKENS, dtype=torch.int64)[: step.tokens],
            128,
            decoded,
            self.per_token,
            table,
            BLOCK // 128,
            meta(MOST_TOKENS, dtype=torch.int64)[: step.tokens],
            self.all_compressed,
            self.per_token,
            self.all_compressed,
            max_compressed_tokens=self.all_compressed.shape[1],
        )
        compressor_utils.get_compressed_slot_mapping(
            step.tokens,
            self.lengths[: requests + 1],
            seq_lens,
            table,
            BLOCK // 4,
            4,
            out=meta(MOST_TOKENS, dtype=torch.int64),
        )
        # Each request has as many tokens before the step as in it.
        compressed = torch.tensor(step.prefills, dtype=torch.int32) * 2 // 4
        chunks = indexer.split_indexer_prefill_chunks(
            compressed, torch.tensor(step.prefills), 40 * MOST_TOKENS, 2**20, decodes
        )
        every = torch.cat([torch.zeros(decodes, dtype=torch.int32), compressed])
        for which, queries in chunks:
            indexer.build_prefill_chunk_metadata(
                which.start,
                which.stop,
                self.lengths[: requests + 1],
                starts,
                seq_lens,
                seq_lens // 4,
                every,
                table,
                4,
                query_slice=queries,
                skip_kv_gather=queries.start > 0,
            )

    def _project(self, module: torch.nn.Module, tokens: int) -> None:
        from vllm.models.deepseek_v4 import attention

        # The package has a function of the module's name.
        upstream = importlib.import_module(
            "vllm.models.deepseek_v4.common.ops.fused_inv_rope_fp8_quant"
        )
        groups, heads = module.n_local_groups, module.n_local_heads
        width = heads // groups * 512
        values, scales = upstream._fused_inv_rope_fp8_quant_kernel_impl(
            meta(tokens, module.padded_heads, 512)[:, :heads],
            meta(tokens, dtype=torch.int64),
            module.rotary_emb.cos_sin_cache.to("meta"),
            heads // groups,
            128,
            4,
            448 % 128,
            32,
            module._tma_aligned_scales,
            448.0,
            -(-tokens // 4) * 4,
            tokens,
            groups,
            width,
            width // 128,
        )
        attention.deepseek_v4_fp8_einsum(
            values.transpose(0, 1),
            scales.transpose(0, 1),
            module.wo_a.weight.to("meta"),
            module.wo_a.weight_scale_inv.to("meta"),
            meta(tokens, groups, module.o_lora_rank),
            "bhr,hdr->bhd",
            list(module._einsum_recipe),
        )

    def _compress(self, module: torch.nn.Module, step: Step) -> None:
        """The keys' compressor, and the indexer's where there is one, by their own forward."""
        from vllm.models.deepseek_v4 import compressor as upstream

        requests = len(step.decodes) + len(step.prefills)
        rotary = SimpleNamespace(cos_sin_cache=module.rotary_emb.cos_sin_cache.to("meta"))
        indexed = [] if module.indexer is None else [module.indexer.compressor]
        for compressor in (module.compressor, *indexed):
            width = 2 * compressor.coff * compressor.head_dim
            metadata = SimpleNamespace(
                token_to_req_indices=self.per_token,
                slot_mapping=meta(MOST_TOKENS, dtype=torch.int64)[: step.tokens],
                block_table=self.table[:requests],
                block_size=compressor.state_cache.kv_cache.shape[1],
            )
            context = SimpleNamespace(
                attn_metadata={
                    compressor.state_cache.prefix: metadata,
                    compressor.k_cache_prefix: metadata,
                }
            )
            with (
                patch.object(upstream, "get_forward_context", lambda context=context: context),
                patch.dict(compressor._parameters, ape=_on_meta(compressor.ape)),
                patch.dict(compressor.norm._parameters, weight=_on_meta(compressor.norm.weight)),
            ):
                compressor(
                    meta(step.tokens, width, dtype=torch.float32),
                    meta(MOST_TOKENS, dtype=torch.int64)[: step.tokens],
                    rotary,
                )

    def _mix(self, layer: torch.nn.Module, tokens: int) -> None:
        from vllm.model_executor.kernels.mhc import tilelang

        streams, x = meta(tokens, self.mult, self.hidden), meta(tokens, self.hidden)
        for part in ("attn", "ffn"):
            mapping = [
                getattr(layer, f"hc_{part}_{name}").to("meta") for name in ("fn", "scale", "base")
            ]
            norm = {"norm_weight": getattr(layer, f"{part}_norm").weight.data.to("meta")}
            numbers = (1e-6, 1e-6, 1e-6, 2.0, 20)
            post, comb, _ = tilelang.mhc_pre_tilelang(streams, *mapping, *numbers, **norm)
            tilelang.mhc_fused_post_pre_tilelang(x, streams, post, comb, *mapping, *numbers, **norm)
        tilelang.mhc_post_tilelang(x, streams, post, comb)

    def _collapse(self, module: torch.nn.Module, tokens: int) -> None:
        from vllm.model_executor.kernels.mhc import tilelang

        tilelang._hc_head_fused_kernel_tilelang(
            meta(tokens, self.mult, self.hidden),
            *(getattr(module, f"hc_head_{name}").to("meta") for name in ("fn", "scale", "base")),
            meta(tokens, self.hidden),
            self.hidden,
            1e-6,
            1e-6,
            self.mult,
        )

    def _route(self, module: torch.nn.Module, tokens: int) -> None:
        from vllm_sm12x.adapters import mxfp4_experts

        experts = module.quant_method.moe_kernel.fused_experts
        with (
            patch.object(mxfp4_experts, "moe_align_block_size", _aligned),
            patch.object(experts.quant_config._w1, "scale", experts.w1_scale.to("meta")),
            patch.object(experts.quant_config._w2, "scale", experts.w2_scale.to("meta")),
        ):
            experts.apply(
                meta(tokens, self.hidden),
                meta(tokens, self.hidden),
                module.w13_weight.to("meta"),
                module.w2_weight.to("meta"),
                meta(tokens, module.top_k, dtype=torch.float32),
                meta(tokens, module.top_k, dtype=I32),
                module.activation,
                module.global_num_experts,
                module.expert_map,
                None,
                None,
                meta(0),
                meta(0),
                None,
                module.apply_router_weight_on_input,
            )

    def _attend(self, layer: torch.nn.Module, step: Step) -> None:
        from vllm.forward_context import override_forward_context
        from vllm.models.deepseek_v4.common.ops import fused_q_kv_rmsnorm

        latents, q_norm, kv_norm = meta(step.tokens, 1536), meta(1024), meta(512)
        fused_q_kv_rmsnorm(*latents.split([1024, 512], dim=-1), q_norm, kv_norm, 1e-6)
        q = meta(step.tokens, layer.padded_heads, 512)
        out = torch.empty_like(q)
        decoded, ratio = sum(step.decodes), layer.compress_ratio
        swa, attn = self._metadata(step, ratio)
        with (
            patch.dict(layer._parameters, attn_sink=_on_meta(layer.attn_sink)),
            patch.object(layer, "topk_indices_buffer", self.topk),
            patch("vllm_sm12x.adapters.sparse_mla.current_workspace_manager", _Workspace),
            override_forward_context(SimpleNamespace(batch_descriptor=None)),
        ):
            if step.decodes:
                layer.impl_cls._forward_decode(
                    layer, q[:decoded], layer.kv_cache, swa, attn, ratio <= 1, out[:decoded]
                )
            if step.prefills:
                layer.impl_cls._forward_prefill(
                    layer,
                    q[decoded:],
                    meta(step.tokens, dtype=torch.int64)[decoded:],
                    layer.kv_cache,
                    layer.swa_cache_layer.kv_cache,
                    out[decoded:],
                    attn,
                    swa,
                )

    def _metadata(self, step: Step, ratio: int) -> tuple[SimpleNamespace, SimpleNamespace | None]:
        requests = len(step.decodes) + len(step.prefills)
        decoded = sum(step.decodes)
        starts = torch.tensor([0, *step.decodes, *step.prefills]).cumsum(0).int()
        swa = SimpleNamespace(
            num_decodes=len(step.decodes),
            num_prefills=len(step.prefills),
            num_decode_tokens=decoded,
            num_prefill_tokens=step.tokens - decoded,
            token_to_req_indices=self.per_token,
            is_valid_token=self.valid[: step.tokens],
            decode_swa_indices=meta(MOST_TOKENS, 1, 128, dtype=I32)[:decoded],
            decode_swa_lens=self.per_token[:decoded],
            query_start_loc=self.lengths[: requests + 1],
            query_start_loc_cpu=starts,
            prefill_seq_lens=self.lengths[len(step.decodes) : requests],
            prefill_gather_lens=meta(len(step.prefills), dtype=I32),
            block_table=self.table[:requests],
            block_size=64,
        )
        if ratio <= 1:
            return swa, None
        prefilled = step.tokens - decoded
        attn = SimpleNamespace(
            block_table=self.table[:requests],
            block_size=BLOCK,
            c128a_global_decode_topk_indices=self.all_compressed[:decoded].unsqueeze(1),
            c128a_decode_topk_lens=self.per_token[:decoded],
            c128a_prefill_topk_indices=self.all_compressed[:prefilled],
        )
        return swa, attn

    def _index(self, module: torch.nn.Module, step: Step) -> None:
        from vllm.model_executor.layers.sparse_attn_indexer import kv_cache_as_quant_view
        from vllm.models.deepseek_v4.common.ops import fused_indexer_q_rope_quant
        from vllm.utils import deep_gemm

        heads, decoded = module.n_head, sum(step.decodes)
        q, weights = fused_indexer_q_rope_quant(
            meta(MOST_TOKENS, dtype=torch.int64)[: step.tokens],
            meta(step.tokens, heads, 128),
            meta(MAX_MODEL_LEN, 64, dtype=torch.float32),
            meta(step.tokens, heads),
            module.softmax_scale,
            heads**-0.5,
        )
        if step.decodes:
            # Requests of unlike lengths are made single tokens of their own, as vLLM flattens them.
            even = len(set(step.decodes)) == 1
            requests, per_request = (len(step.decodes), step.decodes[0]) if even else (decoded, 1)
            deep_gemm.fp8_fp4_paged_mqa_logits(
                (q[:decoded].reshape(requests, per_request, heads, 128), None),
                kv_cache_as_quant_view(module.k_cache.kv_cache, 128, False),
                weights[:decoded],
                self.per_token[:decoded].view(requests, per_request),
                self.table.new_empty(requests, self.table.shape[1]),
                meta(0),
                max_model_len=module.max_model_len,
                clean_logits=False,
            )
        first = decoded
        for tokens in step.prefills:
            keys = 7 * tokens + 1
            deep_gemm.fp8_fp4_mqa_logits(
                (q[first : first + tokens], None),
                (meta(keys, 128, dtype=q.dtype), meta(keys, dtype=torch.float32)),
                weights[first : first + tokens],
                self.per_token[first : first + tokens],
                self.per_token[first : first + tokens],
                clean_logits=False,
            )
            first += tokens


class _Workspace:
    """vLLM's shared memory of a step: every request begins where it begins."""

    def get_simultaneous(self, *wanted: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
        return [meta(*shape, dtype=dtype) for shape, dtype in wanted]


def _ends(modules: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """One of the model's and one of the draft model's: in between all are alike."""
    return [modules[0], modules[-1]]


def _on_meta(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(parameter.data.to("meta"), requires_grad=False)


def _aligned(topk_ids: torch.Tensor, block_size: int, num_experts: int) -> tuple[torch.Tensor, ...]:
    """Tensors as vLLM's kernel allocates them."""
    most = topk_ids.numel() + num_experts * (block_size - 1)
    blocks = -(-most // block_size)
    return meta(most, dtype=I32), meta(blocks, dtype=I32), meta(1, dtype=I32)
