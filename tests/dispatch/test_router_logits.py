"""The router's logits: one product with float32 results, or a bfloat16 product that is widened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

# Flash: hidden size, routed experts, experts of a token.
HIDDEN, EXPERTS, CHOSEN = 4096, 256, 6


@pytest.fixture
def make_gate(
    cuda: type, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., torch.nn.Module]]:
    """Construct a ``GateLinear`` as the models do; on the device and in the type asked for."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear

    # A GPU alone: every rank has the whole router.
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=0, world_size=1))

    def make(
        *sizes: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, **settings: object
    ) -> torch.nn.Module:
        sizes = sizes or (64, 8)
        # Layers take the default type and the default device, which the model loader sets.
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return GateLinear(*sizes, **settings)
        finally:
            torch.set_default_dtype(before)

    with set_current_vllm_config(VllmConfig()):
        yield make


@pytest.fixture
def float32_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, torch.Size]]:
    """Shapes of each ``torch.mm`` with ``out_dtype``.

    PyTorch has it for CUDA and for meta tensors alone. CPU tensors get what it is defined to give:
    products and sums in float32, rounded to nothing less.
    """
    calls = []
    real = torch.mm

    def mm(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype | None = None):
        if out_dtype is None:
            return real(a, b)
        assert (out_dtype, a.dtype, b.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
        calls.append((a.shape, b.shape))
        if a.device.type == "cpu":
            return real(a.float(), b.float())
        return real(a, b, out_dtype=out_dtype)

    monkeypatch.setattr(torch, "mm", mm)
    return calls


def has_release_path(capability: tuple[int, int]) -> bool:
    """Whether the release itself makes the float32 product there, whatever the override."""
    return capability in ((9, 0), (10, 0))


def inputs(tokens: int, gate: torch.nn.Module, seed: int = 3) -> torch.Tensor:
    """Fill the gate's weight; returns drawn tokens. Logits have a deviation of 1."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = gate.weight.shape
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    gate.weight.data.copy_(weight)
    return torch.randn(tokens, columns, generator=generator).to(torch.bfloat16)


@pytest.mark.operation("router_logits")
@pytest.mark.parametrize("late", [False, True], ids=["at_once", "set_later"])
def test_the_product_that_is_taken(portable, case, late, make_gate, float32_products):
    gate = make_gate(out_dtype=None if late else torch.float32)
    if late:
        assert not gate.allow_cublas_router_gemm
        gate.set_out_dtype(torch.float32)
    x = inputs(5, gate)
    logits, bias = gate(x)
    assert bias is None
    assert (logits.shape, logits.dtype) == ((5, 8), torch.float32)
    exact = x.double() @ gate.weight.double().T
    if portable or has_release_path(case.capability):
        assert float32_products == [((5, 64), (64, 8))]
        torch.testing.assert_close(logits.double(), exact, rtol=0, atol=64 * 2.0**-22)
    else:
        assert float32_products == []
        # Upstream's: no more than bfloat16 is left of them.
        assert torch.equal(logits, logits.bfloat16().float())
        assert not torch.equal(exact, exact.bfloat16().double())


@pytest.mark.operation("router_logits")
@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"out_dtype": torch.float32, "bias": True}, torch.bfloat16),
        ({"out_dtype": torch.float32}, torch.float32),
        ({"out_dtype": torch.float32, "params_dtype": torch.float32}, torch.bfloat16),
        ({"out_dtype": torch.bfloat16}, torch.bfloat16),
        ({}, torch.bfloat16),
    ],
    ids=["bias", "float32_model", "float32_weight", "bfloat16_logits", "no_type_asked_for"],
)
def test_every_other_gate_is_upstreams(portable, settings, dtype, make_gate, float32_products):
    del portable
    gate = make_gate(dtype=dtype, **settings)
    if gate.bias is not None:
        torch.nn.init.ones_(gate.bias)
    x = inputs(5, gate).to(dtype)
    logits, _ = gate(x)
    assert float32_products == []
    expected = x.to(gate.weight.dtype).double() @ gate.weight.double().T
    if gate.bias is not None:
        expected += 1
    assert logits.dtype == settings.get("out_dtype", dtype)
    torch.testing.assert_close(logits.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.operation("router_logits")
def test_a_gate_that_computes_in_float32_keeps_its_weights(portable, case, make_gate):
    """With ``force_fp32_compute`` the weights are float32 where the release has no kernel."""
    gate = make_gate(out_dtype=torch.float32, force_fp32_compute=True)
    released = has_release_path(case.capability)
    assert gate.weight.dtype == (torch.bfloat16 if released else torch.float32)
    assert gate.allow_cublas_router_gemm == released


@pytest.mark.operation("router_logits")
def test_the_specialised_kernel_stays_where_it_is(
    portable, case, make_gate, float32_products, monkeypatch
):
    """DeepSeek V3's sizes have a kernel of their own, which SM12x has no code for."""
    import vllm._custom_ops as ops

    special = []

    def dsv3_router_gemm(hidden_states, router_weight, output_dtype):
        special.append(hidden_states.shape)
        return torch.full((hidden_states.shape[0], router_weight.shape[0]), 7.0)

    monkeypatch.setattr(ops, "dsv3_router_gemm", dsv3_router_gemm)
    gate = make_gate(7168, EXPERTS, out_dtype=torch.float32, device="meta")
    gate(torch.empty(16, 7168, dtype=torch.bfloat16, device="meta"))
    gate(torch.empty(17, 7168, dtype=torch.bfloat16, device="meta"))
    released = has_release_path(case.capability)
    assert special == ([(16, 7168)] if released else [])
    ours = [((rows, 7168), (7168, EXPERTS)) for rows in (16, 17)]
    assert float32_products == (ours[1:] if released else ours if portable else [])


@pytest.mark.parametrize("capability", [(12, 0), (12, 1)], ids=["12.0", "12.1"])
def test_torch_compile_traces_it_whole_for_any_number_of_tokens(capability, choose, make_gate):
    choose(capability, None)
    gate = make_gate(HIDDEN, EXPERTS, out_dtype=torch.float32, device="meta")
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[object]) -> Callable[..., object]:
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(gate, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (24, 1024, 7):
        logits, _ = compiled(torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device="meta"))
        assert (logits.shape, logits.dtype) == ((tokens, EXPERTS), torch.float32)
    assert len(graphs) == 1
    assert torch.mm in graphs[0]


def chosen_experts(logits: torch.Tensor, bias: torch.Tensor) -> list[frozenset[int]]:
    """The definition, in float64: the greatest of ``sqrt(softplus(logit)) + bias``."""
    scores = torch.nn.functional.softplus(logits.double()).sqrt() + bias.double()
    return [frozenset(row) for row in scores.topk(CHOSEN, dim=-1).indices.tolist()]


def count_differing(logits: torch.Tensor, exact: torch.Tensor, bias: torch.Tensor) -> int:
    """Tokens whose experts are other ones than those of the exact logits."""
    pairs = zip(chosen_experts(logits, bias), chosen_experts(exact, bias), strict=True)
    return sum(a != b for a, b in pairs)


def correction_bias() -> torch.Tensor:
    """About 8, as the checkpoint's are, and not all alike."""
    return 8.0 + 0.05 * torch.randn(EXPERTS, generator=torch.Generator().manual_seed(8))


def test_the_rounding_to_bfloat16_exchanges_experts(choose, make_gate, float32_products):
    tokens, bias = 2048, correction_bias()
    differing, errors = {}, {}
    for override in (None, "none"):
        choose((12, 0), override)
        gate = make_gate(HIDDEN, EXPERTS, out_dtype=torch.float32)
        x = inputs(tokens, gate)
        exact = x.double() @ gate.weight.double().T
        logits, _ = gate(x)
        differing[override] = count_differing(logits, exact, bias)
        errors[override] = ((logits - exact).pow(2).mean() / exact.pow(2).mean()).sqrt().item()
    assert len(float32_products) == 1
    # bfloat16 keeps 8 bits: 2**-9 at most, and about 2**-10 in the mean.
    assert 2.0**-11 < errors["none"] < 2.0**-9
    assert errors[None] < 2.0**-19
    # Two neighbours among 256 scores are often nearer than that.
    assert differing["none"] >= tokens // 100
    assert differing[None] <= differing["none"] // 20


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 24, 333, 4096])
def test_the_logits_of_a_gpu_against_float64(tokens, choose, make_gate):
    choose((12, 0), "all")
    gate = make_gate(HIDDEN, EXPERTS, out_dtype=torch.float32, device="cuda")
    bias = correction_bias().to("cuda")
    x = inputs(tokens, gate).to("cuda")
    exact = x.double() @ gate.weight.double().T
    logits, _ = gate(x)
    assert (logits.shape, logits.dtype) == ((tokens, EXPERTS), torch.float32)
    assert not torch.equal(logits, logits.bfloat16().float())
    error = ((logits - exact).pow(2).mean() / exact.pow(2).mean()).sqrt().item()
    # A sum of 4,096 terms in float32, however a matrix unit cuts them: 4,096 / 16 steps of at most
    # 2**-23 of the sum. The rounding to bfloat16 would be 2**-10.
    assert error < 2.0**-15 * 2
    rounded = torch.nn.functional.linear(x, gate.weight).float()
    if tokens >= 333:
        worse = count_differing(rounded, exact, bias)
        assert worse > 0
        assert count_differing(logits, exact, bias) <= worse // 5


@pytest.mark.gpu
def test_a_captured_graph_gives_the_logits_of_its_new_input(choose, make_gate):
    choose((12, 0), "all")
    gate = make_gate(HIDDEN, EXPERTS, out_dtype=torch.float32, device="cuda")
    x = inputs(24, gate).to("cuda")
    gate(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, _ = gate(x)
    logits.fill_(float("nan"))
    x.copy_(inputs(24, gate, seed=4))
    graph.replay()
    torch.cuda.synchronize()
    expected = x.double() @ gate.weight.double().T
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=2.0**-11)
