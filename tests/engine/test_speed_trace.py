"""Shares of a step, from traces that are written here, and what a step must at least do."""

import gzip
import json

import pytest

from benchmarks.engine import model, tables, trace, work
from benchmarks.engine.work import Work
from tests.engine.test_speed_tables import PORTABLE, lines, row

STEP = "execute_context_0(0)_generation_1(3)"


def event(cat, name, ts, dur):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {}}


EVENTS = [
    event("user_annotation", STEP, 0, 40),
    event("gpu_user_annotation", STEP, 0, 45),
    event("cpu_op", "aten::mm", 0, 500),
    event("kernel", "product_kernel", 10, 20),
    event("kernel", "split_kernel", 20, 20),  # beside the one before, on another stream
    event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 50, 2),
    event("user_annotation", STEP, 100, 40),
    event("kernel", "product_kernel", 110, 30),
    event("kernel", "void at::native::vectorized_elementwise_kernel<4, X>(int)", 145, 5),
    event("user_annotation", "something else", 0, 1000),
]


def test_a_step_is_the_mean_of_the_traced_ones():
    found = trace.profile(EVENTS, "decode")
    assert found.steps == 2
    # 10 to 150; 10-40, 50-52, 110-140, 145-150 covered.
    assert (found.span_us, found.busy_us, found.sum_us) == (70.0, 33.5, 38.5)
    assert [(one.operation, one.us, one.launches) for one in found.shares] == [
        ("mxfp4_experts", 25.0, 1.0),
        ("sparse_mla_decode", 10.0, 0.5),
        ("PyTorch", 2.5, 0.5),
        ("copies", 1.0, 0.5),
    ]
    assert sum(one.share for one in found.shares) == pytest.approx(1.0, abs=1e-3)
    assert found.shares[2].kernels == ["at::native::vectorized_elementwise_kernel"]


@pytest.mark.parametrize(
    ("kernel", "operation"),
    [
        ("split_kernel", "sparse_mla_decode"),
        ("prefill_kernel", "sparse_mla_prefill"),
        ("logits_kernel", "mqa_logits"),
        ("paged_logits_kernel", "paged_mqa_logits"),
        ("einsum_kernel", "fp8_einsum"),
        ("finish_kernel", "mhc"),
        ("weighted_sum_kernel", "mxfp4_experts"),
        ("void sm90::fwd::sparse_attn_fwd_kernel<KernelTemplate<512, true>>", "sparse_mla_prefill"),
        (
            "void sm90::decode::sparse_fp8::flash_fwd_splitkv_mla_fp8_sparse_kernel<X>(Y)",
            "sparse_mla_decode",
        ),
        ("void smxx::flash_fwd_mla_combine_kernel<bf16, 512>", "sparse_mla_decode"),
        ("void deep_gemm::sm90_fp8_paged_mqa_logits<1u, 64u>", "paged_mqa_logits"),
        ("void deep_gemm::smxx_paged_mqa_logits_metadata<32u>", "paged_mqa_logits"),
        ("void deep_gemm::sm90_fp8_mqa_logits<64u, 128u>", "mqa_logits"),
        (
            "void deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, (deep_gemm::GemmType)0, 1u>",
            "fp8_linear",
        ),
        ("void deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, (deep_gemm::GemmType)4, 1u>", "fp8_einsum"),
        ("void deep_gemm::sm90_tf32_hc_prenorm_gemm_impl<24u>", "mhc"),
        ("mhc_fused_post_pre_tilelang_kernel", "mhc"),
        ("void marlin_moe_wna16::Marlin<__nv_bfloat16, 4>", "mxfp4_experts"),
        ("void vllm::moe::moe_align_block_size_kernel<int>", "routing"),
        ("void vllm::persistent::persistent_topk_kernel<512>", "indexer top-k"),
        ("_fused_q_kv_rmsnorm_kernel", "norms, rotary, quantisation"),
        ("_save_partial_states_kernel", "compressor, caches"),
        ("_dequantize_and_gather_k_kernel", "KV gather"),
        ("void at::native::vectorized_gather_kernel<16, long>", "PyTorch"),
        ("void vllm::cp_gather_indexer_k_quant_cache_kernel<8>", "compressor, caches"),
        ("_combine_topk_swa_indices_kernel", "indices, metadata"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
        ("nvjet_tst_128x64_64x8_2x1_v_bz_TNT", "other matrix products"),
        ("triton_red_fused_mul_3", "compiled by torch"),
        ("rejection_greedy_sample_kernel", "sampling, drafting"),
        ("Memset (Device)", "copies"),
        ("nothing_that_is_known", "other"),
    ],
)
def test_a_kernel_is_put_to_its_operation(kernel, operation):
    assert trace.classify(kernel) == operation


def test_every_operation_of_ours_has_kernels():
    found = set(trace.own_kernels().values())
    assert {
        *("sparse_mla_decode", "sparse_mla_prefill", "mqa_logits", "paged_mqa_logits"),
        *("fp8_einsum", "mhc", "mxfp4_experts"),
    } <= found


def test_a_trace_is_read_packed_or_not(tmp_path):
    said = json.dumps({"traceEvents": [*EVENTS, {"ph": "M", "name": "a name"}]}).encode()
    plain, packed = tmp_path / "a.json", tmp_path / "b.json.gz"
    plain.write_bytes(said)
    packed.write_bytes(gzip.compress(said))
    assert trace.load(plain) == trace.load(packed) == EVENTS


def test_steps_without_a_token_of_the_prompt_are_no_chunks():
    """Three of a prompt, the last with an answer's token, and two that were scheduled ahead."""
    spans = ["1(4096)_generation_0(0)"] * 2 + ["1(8)_generation_1(3)", "0(0)_generation_1(3)"]
    spans.append("0(0)_generation_0(0)")
    steps = [EVENTS[0] | {"cat": "user_annotation", "name": f"execute_context_{s}"} for s in spans]
    kernels = [one for one in EVENTS if one["cat"] != "user_annotation"]
    assert trace.profile([*steps, *kernels], "prefill").steps == 3
    assert trace.profile([*steps, *kernels], "decode").steps == 2


@pytest.mark.parametrize("said", [b"{}", b"no", b'{"traceEvents": 3}'])
def test_a_file_that_is_no_trace_is_named(tmp_path, said):
    path = tmp_path / "a.json"
    path.write_bytes(said)
    with pytest.raises(ValueError, match="a.json"):
        trace.load(path)


def test_a_trace_without_steps_or_kernels_says_so():
    with pytest.raises(ValueError, match="0 steps and 5 kernels"):
        trace.profile([one for one in EVENTS if one["name"] != STEP], "decode")
    with pytest.raises(ValueError, match="2 steps and 0 kernels"):
        trace.profile([one for one in EVENTS if one["cat"] == "user_annotation"], "decode")


def test_what_a_decode_step_must_read():
    """By hand, from the published sizes: 5 layers of 1 x 0, 2 x 4, 2 x 128, and the draft twice."""
    found = work.decode(model.config(5), requests=1, context=8192, mtp=2)
    # q_a and kv 4096 x 1536; q_b 1024 x 32768; o_b 8192 x 4096; shared expert 3 x 4096 x 2048.
    plain = 4096 * 1536 + 1024 * 32768 + 8192 * 4096 + 3 * 4096 * 2048
    assert found["fp8_linear"].nbytes == 7 * plain + 2 * 1024 * 8192
    assert found["fp8_einsum"].nbytes == 7 * 32768 * 1024
    # Of 256 experts three rows touch 6 each, seldom the same twice; the second draft is one row.
    touched = 256 * (1 - (250 / 256) ** 3)
    assert 17 < touched < 18
    expert = 3 * 4096 * 2048 * (0.5 + 1 / 32)
    assert found["mxfp4_experts"].nbytes == pytest.approx((6 * touched + 6) * expert)
    # Keys of 3 rows: 128 of the window (two layers); and 512; and 8192 / 128. And of one row.
    keys = 3 * (2 * 128 + 2 * (128 + 512) + 2 * (128 + 64)) + 128
    assert found["sparse_mla_decode"] == Work(4 * 64 * 512 * keys, 584 * keys)
    # Two C4A layers; a request's rows share their keys.
    assert found["paged_mqa_logits"] == Work(2 * 3 * 2048 * 2 * 64 * 128, 2 * 2048 * 132)
    # The head in bf16, for the model and each draft.
    assert found["other matrix products"].nbytes == 3 * 129280 * 4096 * 2


def test_what_a_chunk_must_compute():
    found = work.prefill(model.config(5), tokens=4096, behind=0, mtp=2)
    # Six passes of a layer: the draft reads the prompt once.
    assert found["mxfp4_experts"].flops == 6 * 4096 * 6 * 2 * 3 * 4096 * 2048
    assert found["fp8_einsum"].flops == 6 * 4096 * 2 * 32768 * 1024
    # In the middle a query has 2,048 tokens behind it: 512 compressed keys to look at.
    assert found["mqa_logits"].flops == 2 * 4096 * 512 * 2 * 64 * 128


def test_two_gpus_halve_what_is_split():
    one = work.decode(model.config(5), 1, 8192, 2)
    two = work.decode(model.config(5), 1, 8192, 2, tp=2)
    assert two["mxfp4_experts"].nbytes == one["mxfp4_experts"].nbytes / 2
    assert one["fp8_linear"].nbytes / 2 < two["fp8_linear"].nbytes < one["fp8_linear"].nbytes


def test_the_roof_is_the_slower_of_the_two():
    assert Work(flops=790e6, nbytes=4.3e6).us(4300.0, 790.0) == pytest.approx(1.0)
    assert Work(flops=1580e6, nbytes=4.3e6).us(4300.0, 790.0) == pytest.approx(2.0)
    assert Work(flops=790e6, nbytes=8.6e6).us(4300.0, 790.0) == pytest.approx(2.0)


def shares(*pairs):
    total = sum(us for _, us in pairs)
    return [
        {"operation": name, "us": us, "launches": 7.0, "share": us / total, "kernels": ["k"]}
        for name, us in pairs
    ]


def test_the_largest_three_say_what_they_would_gain():
    found = tables.report(
        [
            row(
                "profile",
                PORTABLE,
                of="decode",
                concurrency=1,
                context=8192,
                steps=40,
                span_us=1200.0,
                busy_us=1000.0,
                sum_us=1000.0,
                shares=shares(
                    ("mxfp4_experts", 600.0), ("PyTorch", 200.0), ("fp8_einsum", 150.0), ("mhc", 50)
                ),
            )
        ]
    )
    # The experts' bytes at 4,300 GB/s: (6 layers x 17.6 experts + 6) x 13.4 MB: 347 µs.
    assert "| mxfp4_experts | 600 | 60.0% | 7 | 347 | 25% | k |" in lines(found)
    assert "| PyTorch | 200 | 20.0% | 7 | – | – | k |" in lines(found)
    # 7 x 33.6 MB: 54.6 µs.
    assert "| fp8_einsum | 150 | 15.0% | 7 | 54.6 | 10% | k |" in lines(found)
    assert "40 steps; of each 1,200 µs a kernel ran in 1,000 µs" in found


def test_a_machine_whose_roof_is_not_known_has_none():
    said = row(
        "profile",
        of="prefill",
        prompt_tokens=8192,
        steps=2,
        span_us=9.0,
        busy_us=9.0,
        sum_us=9.0,
        shares=shares(("mxfp4_experts", 9.0)),
    )
    assert "| mxfp4_experts | 9 | 100.0% | 7 | – | – | k |" in lines(
        tables.report([said | {"machine": "1 x Some GPU"}])
    )
    with_roof = tables.report([said])
    assert "a chunk of a prompt of 8,192 tokens" in with_roof
    assert "– | – | k" not in with_roof
