"""The ``sm12x`` backend of vLLM's MXFP4 oracle, and when the oracle chooses it."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
EXPERTS, HIDDEN, INTERMEDIATE, LIMIT = 4, 64, 32, 3.0


def moe_config(**changes: object) -> object:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    parallel = {
        "tp_size": 1,
        "pcp_size": 1,
        "dp_size": 1,
        "ep_size": 1,
        "tp_rank": 0,
        "pcp_rank": 0,
        "dp_rank": 0,
        "ep_rank": 0,
        "sp_size": 1,
        "use_ep": False,
        "all2all_backend": "allgather_reducescatter",
        "enable_eplb": False,
    }
    parallel.update({name: changes.pop(name) for name in list(changes) if name in parallel})
    settings = {
        "num_experts": 256,
        "experts_per_token": 6,
        "hidden_dim": 4096,
        "intermediate_size_per_partition": 2048,
        "num_local_experts": 256,
        "num_logical_experts": 256,
        "activation": MoEActivation.SILU,
        "device": "cpu",
        "routing_method": RoutingMethodType.DeepseekV4,
        "moe_parallel_config": FusedMoEParallelConfig(**parallel),
        "in_dtype": torch.bfloat16,
        "router_logits_dtype": torch.float32,
        "swiglu_limit": 10.0,
        **changes,
    }
    return FusedMoEConfig(**settings)


def packed_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    return {
        "w13": integers(0, 256, EXPERTS, 2 * INTERMEDIATE, HIDDEN // 2),
        "w13_scale": integers(122, 128, EXPERTS, 2 * INTERMEDIATE, HIDDEN // 32),
        "w2": integers(0, 256, EXPERTS, HIDDEN, INTERMEDIATE // 2),
        "w2_scale": integers(122, 128, EXPERTS, HIDDEN, INTERMEDIATE // 32),
    }


def decode(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """OCP MXFP4 in float64: two E2M1 values a byte, the low nibble first, 32 to a scale."""
    table = torch.tensor(E2M1 + [-value for value in E2M1], dtype=torch.float64)
    values = torch.stack([table[(packed & 15).long()], table[(packed >> 4).long()]], -1)
    factor = torch.pow(2.0, scale.double() - 127).repeat_interleave(32, -1)
    return values.flatten(-2) * factor


def test_the_name_is_taken_and_a_misspelt_one_refused(cuda):
    from pydantic import ValidationError
    from vllm.config.kernel import KernelConfig
    from vllm.model_executor.layers.fused_moe.oracle import mxfp4

    assert KernelConfig(moe_backend="sm12x").moe_backend == "sm12x"
    with pytest.raises(ValidationError, match="sm12x"):
        KernelConfig(moe_backend="sm12")
    assert mxfp4.map_mxfp4_backend("sm12x") == [mxfp4.Mxfp4MoeBackend.SM12X]
    with pytest.raises(ValueError, match="'sm121' is not supported for MXFP4 MoE.*'sm12x'"):
        mxfp4.map_mxfp4_backend("sm121")


def test_the_backend_has_its_own_name_and_class(cuda):
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import (
        Mxfp4MoeBackend,
        _backend_activation_key,
        backend_to_kernel_cls,
    )

    from vllm_sm12x.adapters.mxfp4_experts import SM12xMxfp4Experts

    values = [backend.value for backend in Mxfp4MoeBackend]
    assert values.count("SM12X") == 1
    assert backend_to_kernel_cls(Mxfp4MoeBackend.SM12X) == [SM12xMxfp4Experts]
    # None: activations stay bfloat16.
    assert _backend_activation_key(Mxfp4MoeBackend.SM12X) is None


@pytest.mark.operation("mxfp4_experts")
def test_the_order_of_the_default_backends(portable):
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import _get_priority_backends

    names = [backend.name for backend in _get_priority_backends()]
    upstream = ["FLASHINFER_TRTLLM_MXFP4_MXFP8", "DEEPGEMM_MXFP4", "MARLIN", "BATCHED_MARLIN"]
    assert names == (["SM12X"] if portable else upstream)


@pytest.mark.operation("mxfp4_experts")
def test_what_the_oracle_selects(case, portable):
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import (
        select_deepseek_v4_mxfp4_moe_backend,
    )

    backend, experts = select_deepseek_v4_mxfp4_moe_backend(moe_config())
    if portable:
        assert (backend.name, experts.__name__) == ("SM12X", "SM12xMxfp4Experts")
    elif case.capability == (10, 0):
        # Depends on what is installed; never ours.
        assert backend.name in ("FLASHINFER_TRTLLM_MXFP4_MXFP8", "DEEPGEMM_MXFP4", "MARLIN")
    else:
        assert (backend.name, experts.__name__) == ("MARLIN", "MarlinExperts")


@pytest.mark.operation("mxfp4_experts")
@pytest.mark.parametrize(
    ("asked", "given"), [("marlin", "MarlinExperts"), ("sm12x", "SM12xMxfp4Experts")]
)
def test_an_explicit_backend_wins_on_both_paths(portable, asked, given):
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import (
        select_deepseek_v4_mxfp4_moe_backend,
    )

    del portable
    _, experts = select_deepseek_v4_mxfp4_moe_backend(moe_config(moe_backend=asked))
    assert experts.__name__ == given


def test_expert_parallel_over_all2all_takes_what_it_can(choose):
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import (
        select_deepseek_v4_mxfp4_moe_backend,
    )

    choose((12, 0), None)
    backend, _ = select_deepseek_v4_mxfp4_moe_backend(moe_config(use_ep=True, ep_size=2))
    assert backend.name == "SM12X"
    for kernels in ("flashinfer_nvlink_two_sided", "flashinfer_nvlink_one_sided"):
        config = moe_config(use_ep=True, ep_size=2, dp_size=2, all2all_backend=kernels)
        with pytest.raises(NotImplementedError, match="No MXFP4 MoE backend"):
            select_deepseek_v4_mxfp4_moe_backend(config)


def supported(
    config: object,
    weight: str = "kMxfp4Static",
    activation: str | None = None,
    batched: bool = False,
) -> bool:
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.model_executor.layers.quantization.utils import quant_utils

    from vllm_sm12x.adapters.mxfp4_experts import SM12xMxfp4Experts

    form = mk.FusedMoEActivationFormat
    answer, reason = SM12xMxfp4Experts.is_supported_config(
        SM12xMxfp4Experts,
        config,
        getattr(quant_utils, weight),
        None if activation is None else getattr(quant_utils, activation),
        form.BatchedExperts if batched else form.Standard,
    )
    assert (reason is None) is answer
    return answer


def test_which_layers_the_backend_takes(cuda):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    assert supported(moe_config())
    assert supported(moe_config(), weight="kMxfp4Static", activation=None)
    for activation in ("kMxfp8Dynamic", "kFp8Dynamic128Sym", "kMxfp4Dynamic"):
        assert not supported(moe_config(), activation=activation)
    for weight in ("kFp8Static128BlockSym", "kNvfp4Static", "kMxfp8Static"):
        assert not supported(moe_config(), weight=weight)
    assert not supported(moe_config(activation=MoEActivation.GELU))
    assert not supported(moe_config(is_act_and_mul=False))
    assert not supported(moe_config(is_lora_enabled=True))
    assert not supported(moe_config(), batched=True)


def test_a_platform_that_is_not_cuda_is_refused(cuda, monkeypatch):
    monkeypatch.setattr(cuda, "is_cuda", lambda self: False)
    assert not supported(moe_config())


def test_the_weights_keep_their_layout_and_storage(cuda):
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import (
        Mxfp4MoeBackend,
        convert_weight_to_mxfp4_moe_kernel_format,
    )

    weights = packed_weights()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    given = (weights["w13"], weights["w2"], weights["w13_scale"], weights["w2_scale"])
    converted = convert_weight_to_mxfp4_moe_kernel_format(
        Mxfp4MoeBackend.SM12X, torch.nn.Module(), *given
    )
    assert [tensor.data_ptr() for tensor in converted[:4]] == [
        tensor.data_ptr() for tensor in given
    ]
    assert converted[4:] == (None, None)
    for name, tensor in weights.items():
        assert torch.equal(tensor, before[name])


def quant_config(limit: float | None = LIMIT, **biases: torch.Tensor) -> object:
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import (
        Mxfp4MoeBackend,
        make_mxfp4_moe_quant_config,
    )

    weights = packed_weights()
    return make_mxfp4_moe_quant_config(
        Mxfp4MoeBackend.SM12X,
        w1_scale=weights["w13_scale"],
        w2_scale=weights["w2_scale"],
        swiglu_limit=limit,
        **biases,
    )


def test_the_quant_config_is_w4a16_and_carries_the_clamp(cuda):
    config = quant_config()
    assert config.gemm1_clamp_limit == LIMIT
    assert config.quant_dtype is None
    assert config.weight_quant_dtype == "mxfp4"
    assert torch.equal(config.w1_scale, packed_weights()["w13_scale"])
    assert torch.equal(config.w2_scale, packed_weights()["w2_scale"])


def experts(config: object) -> object:
    from vllm_sm12x.adapters.mxfp4_experts import SM12xMxfp4Experts

    return SM12xMxfp4Experts(moe_config(), config)


def apply(
    kernel: object,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    workspaces: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    on_input: bool = False,
) -> None:
    """As vLLM calls it, with the packed weights."""
    weights = packed_weights()
    kernel.apply(
        output=out,
        hidden_states=x,
        w1=weights["w13"],
        w2=weights["w2"],
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        activation=kernel.moe_config.activation,
        global_num_experts=EXPERTS if expert_map is None else len(expert_map),
        expert_map=expert_map,
        a1q_scale=None,
        a2_scale=None,
        workspace13=workspaces[0],
        workspace2=workspaces[1],
        expert_tokens_meta=None,
        apply_router_weight_on_input=on_input,
    )


@pytest.fixture
def activations(cuda, monkeypatch):
    """Set ``SM12X_EXPERT_ACTIVATIONS``; ``None`` unsets it."""
    from vllm_sm12x.adapters.mxfp4_experts import ENV, expert_activations

    def set_to(value: str | None) -> None:
        if value is None:
            monkeypatch.delenv(ENV, raising=False)
        else:
            monkeypatch.setenv(ENV, value)
        expert_activations.cache_clear()

    yield set_to
    expert_activations.cache_clear()


@pytest.mark.parametrize(
    ("value", "format"),
    [(None, "bfloat16"), ("", "bfloat16"), ("auto", "bfloat16"), ("bfloat16", "bfloat16")]
    + [("float8", "float8")],
)
def test_activations_come_in_the_format_of_the_setting(activations, monkeypatch, value, format):
    """In a call, and in what is compiled before the first one."""
    from vllm.model_executor.layers.fused_moe.layer import FusedMoE

    from vllm_sm12x.adapters import mxfp4_experts, warm_up

    activations(value)
    kernel = experts(quant_config())
    monkeypatch.setattr(mxfp4_experts, "mxfp4_experts", called := Mock())
    x, ids = torch.zeros(2, HIDDEN, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int32)
    apply(kernel, x, torch.ones(2, 1), ids, torch.empty_like(x))
    assert called.call_args.kwargs["activations"] == format

    layer = FusedMoE.__new__(FusedMoE)
    torch.nn.Module.__init__(layer)
    weights = packed_weights()
    layer.w13_weight, layer.w2_weight = weights["w13"], weights["w2"]
    layer.top_k, layer.apply_router_weight_on_input = 2, False
    layer._expert_map, layer.rocm_aiter_fmoe_enabled = None, False
    layer.quant_method = SimpleNamespace(
        moe_kernel=SimpleNamespace(fused_experts=kernel), topk_indices_dtype=None
    )
    calls = warm_up.Calls(frozenset({"mxfp4_experts"}), (12, 0))
    warm_up._add_experts(calls, layer, warm_up.Limits(8, 8, 8))
    ((_, *arguments),) = calls.by_key
    assert [one for one in arguments if isinstance(one, str)] == [format]


def test_a_format_that_is_none_is_refused(activations):
    from vllm_sm12x.adapters.mxfp4_experts import expert_activations

    activations("int8")
    message = "SM12X_EXPERT_ACTIVATIONS='int8' is not allowed; allowed: auto, bfloat16, float8"
    with pytest.raises(ValueError, match=message):
        expert_activations()


@pytest.mark.parametrize("name", ["w1_bias", "w2_bias"])
def test_a_bias_is_an_error(cuda, name):
    config = quant_config(**{name: torch.zeros(EXPERTS, 8)})
    with pytest.raises(ValueError, match="w1_bias, w2_bias: .*no bias, allowed: None"):
        experts(config)


def definition(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    limit: float | None,
    on_input: bool,
) -> torch.Tensor:
    weights = packed_weights()
    w13 = decode(weights["w13"], weights["w13_scale"])
    w2 = decode(weights["w2"], weights["w2_scale"])
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for slot in range(topk_ids.shape[1]):
            expert, weight = int(topk_ids[token, slot]), topk_weights[token, slot].double()
            if expert < 0:
                continue
            gate_up = w13[expert] @ x[token].double()
            if on_input:
                gate_up = gate_up * weight
            gate, up = gate_up[:INTERMEDIATE], gate_up[INTERMEDIATE:]
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            inner = gate / (1 + torch.exp(-gate)) * up
            result = w2[expert] @ inner.to(torch.bfloat16).double()
            out[token] += result if on_input else weight * result
    return out


@pytest.mark.parametrize("limit", [LIMIT, None])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_apply_equals_the_definition(form, limit, on_input, mapped):
    generator = torch.Generator().manual_seed(12)
    top_k = 1 if on_input else 2
    x = torch.randn(5, HIDDEN, generator=generator).to(torch.bfloat16)
    topk_ids = torch.randint(0, EXPERTS, (5, top_k), generator=generator).int()
    topk_weights = torch.rand(5, top_k, generator=generator) + 0.25
    expert_map, here = None, topk_ids
    if mapped:
        # Experts 0 and 2 of six live elsewhere; the rest are 3, 0, 1, 2 here.
        expert_map = torch.tensor([-1, 3, -1, 0, 1, 2], dtype=torch.int32)
        topk_ids = torch.randint(0, 6, (5, top_k), generator=generator).int()
        here = expert_map[topk_ids.long()]
        assert (here < 0).any()
        assert (here >= 0).any()
    out = torch.full((5, HIDDEN), float("nan"), dtype=torch.bfloat16)
    kernel = experts(quant_config(limit))
    shapes = kernel.workspace_shapes(
        M=5,
        N=2 * INTERMEDIATE,
        K=HIDDEN,
        topk=top_k,
        global_num_experts=6 if mapped else EXPERTS,
        local_num_experts=EXPERTS,
        expert_tokens_meta=None,
        activation=kernel.moe_config.activation,
    )
    assert shapes[2] == (5, HIDDEN)
    workspaces = (torch.empty(shapes[0]), torch.empty(shapes[1]))
    apply(kernel, x, topk_weights, topk_ids, out, expert_map, workspaces, on_input)
    expected = definition(x, topk_weights, here, limit, on_input)
    scale = expected.abs().amax()
    # The inner result may round to the other neighbour in bfloat16, and the sum rounds once.
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=float(scale) * 2**-8)
    if limit is not None:
        # The clamp matters for these inputs, so that a lost limit is seen.
        unclamped = definition(x, topk_weights, here, None, on_input)
        assert (unclamped - expected).abs().amax() > scale / 20


def test_the_engine_may_reuse_our_output(cuda):
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
        TopKWeightAndReduceNoOP,
    )

    kernel = experts(quant_config())
    assert isinstance(kernel.finalize_weight_and_reduce_impl(), TopKWeightAndReduceNoOP)
    assert kernel.supports_expert_map()
    assert SimpleNamespace(batched=kernel.is_monolithic()).batched is False


def test_many_pairs_are_sorted_by_vllms_own_operation(cuda, monkeypatch):
    from vllm.model_executor.layers.fused_moe import moe_align_block_size as routing

    from vllm_sm12x.adapters import mxfp4_experts as adapter

    given = {}
    monkeypatch.setattr(adapter, "mxfp4_experts", lambda *args, **kwargs: given.update(kwargs))
    kernel = experts(quant_config())
    x = torch.zeros(1, HIDDEN, dtype=torch.bfloat16)
    kernel.apply(
        output=x,
        hidden_states=x,
        w1=x,
        w2=x,
        topk_weights=x,
        topk_ids=x,
        activation=kernel.moe_config.activation,
        global_num_experts=EXPERTS,
        expert_map=None,
        a1q_scale=None,
        a2_scale=None,
        workspace13=x,
        workspace2=x,
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
    assert given["align"] is routing.moe_align_block_size
