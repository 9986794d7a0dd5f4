"""CuTeDSL or Triton: the compressor, the gather of keys, and the indexer's query."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from vllm_sm12x.ops.compressor import compress_to_cache

NVIDIA_OPS = "vllm.models.deepseek_v4.nvidia.ops"


class Kernel(Mock):
    """A Triton kernel: ``kernel[grid](...)`` records the grid, then the call."""

    def __getitem__(self, grid: tuple[int, ...]) -> Mock:
        self.grid = grid
        return self.launch


def stub_module(monkeypatch: pytest.MonkeyPatch, name: str, *functions: str) -> types.ModuleType:
    """A stand-in for a module whose import needs CuTeDSL and a GPU driver."""
    module = types.ModuleType(f"{NVIDIA_OPS}.{name}")
    for function in functions:
        setattr(module, function, Mock(name=function))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def run_compressor(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, ratio: int = 4
) -> dict[str, object]:
    """The real ``forward`` of a compressor layer; returns what its last kernel must be given."""
    from vllm.models.deepseek_v4 import compressor as module

    monkeypatch.setattr(module, "save_partial_states", Mock())
    state = SimpleNamespace(
        token_to_req_indices=object(),
        slot_mapping=torch.zeros(3),
        block_table=object(),
        block_size=4,
    )
    key_cache_metadata, key_cache = object(), object()
    context = {"c.state": state, "c.keys": key_cache_metadata}
    monkeypatch.setattr(
        module, "get_forward_context", lambda: SimpleNamespace(attn_metadata=context)
    )
    layer = object.__new__(module.DeepseekCompressor)
    torch.nn.Module.__init__(layer)
    overlap = ratio == 4
    layer.compress_ratio, layer.overlap, layer.coff = ratio, overlap, 1 + overlap
    layer.head_dim, layer.rope_head_dim, layer.use_fp4_cache = head_dim, 64, False
    layer.ape = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    layer.norm = SimpleNamespace(weight=object())
    layer.rms_norm_eps = 1e-6
    layer._quant_block, layer._token_stride, layer._scale_dim = 64, 576, 8
    layer.k_cache_prefix = "c.keys"
    layer._static_forward_context = {"c.keys": SimpleNamespace(kv_cache=key_cache)}
    layer.state_cache = SimpleNamespace(prefix="c.state", kv_cache=torch.zeros(2, 4, 32))
    positions, rotary = object(), SimpleNamespace(cos_sin_cache=object())
    layer.forward(torch.zeros(3, 2 * layer.coff * head_dim), positions, rotary)
    return {
        "state_cache": layer.state_cache.kv_cache,
        "num_actual": 3,
        "token_to_req_indices": state.token_to_req_indices,
        "positions": positions,
        "slot_mapping": state.slot_mapping,
        "block_table": state.block_table,
        "block_size": 4,
        "state_width": 16,
        "cos_sin_cache": rotary.cos_sin_cache,
        "kv_cache": key_cache,
        "k_cache_metadata": key_cache_metadata,
        "pdl_kwargs": {"launch_pdl": False},
        "head_dim": head_dim,
        "rope_head_dim": 64,
        "compress_ratio": ratio,
        "overlap": overlap,
        "use_fp4_cache": False,
        "rms_norm_weight": layer.norm.weight,
        "rms_norm_eps": 1e-6,
        "quant_block": 64,
        "token_stride": 576,
        "scale_dim": 8,
    }


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Set ``SM12X_KERNELS``."""
    from vllm_sm12x import implementation

    def choose_kernels(value: str) -> None:
        monkeypatch.setenv("SM12X_KERNELS", value)
        implementation.clear_cache()

    yield choose_kernels
    implementation.clear_cache()


@pytest.mark.operation("cutedsl")
@pytest.mark.parametrize("setting", ["auto", "none", "all", "cutedsl", "mhc"])
@pytest.mark.parametrize(("head_dim", "ratio"), [(512, 4), (512, 128), (128, 4)])
def test_the_compressor(portable, head_dim, ratio, setting, kernels, monkeypatch):
    from vllm.models.deepseek_v4 import compressor

    kernels(setting)
    cute = stub_module(
        monkeypatch, "sparse_attn_compress_cutedsl", "compress_norm_rope_store_cutedsl"
    ).compress_norm_rope_store_cutedsl
    triton, ours = Mock(name="Triton"), Mock(name="ours")
    monkeypatch.setattr(compressor, "compress_norm_rope_store_triton", triton)
    monkeypatch.setattr(compressor.sm12x_compressor, "compress_norm_rope_store", ours)
    arguments = run_compressor(monkeypatch, head_dim, ratio)
    # Upstream: CuTeDSL for the keys (512), Triton for the indexer (128).
    taken = triton
    if head_dim == 512 and not portable:
        taken = cute
    elif head_dim == 512 and ratio == 128 and setting in ("auto", "all", "cutedsl"):
        taken = ours
    taken.assert_called_once_with(**arguments)
    assert sum(kernel.called for kernel in (cute, triton, ours)) == 1


def compressor_arguments(**changes: object) -> dict[str, object]:
    """What vLLM's compressor gives for C128A's keys, five tokens."""
    return {
        "state_cache": torch.zeros(3, 8, 1024),
        "num_actual": 5,
        "token_to_req_indices": torch.zeros(9, dtype=torch.int32),
        "positions": torch.zeros(9, dtype=torch.int64),
        "slot_mapping": torch.zeros(9, dtype=torch.int64),
        "block_table": torch.zeros(1, 4, dtype=torch.int32),
        "block_size": 8,
        "state_width": 512,
        "cos_sin_cache": torch.zeros(16, 64),
        "kv_cache": torch.zeros(3, 2, 584, dtype=torch.uint8),
        "k_cache_metadata": SimpleNamespace(slot_mapping=torch.zeros(5, dtype=torch.int64)),
        "pdl_kwargs": {"launch_pdl": False},
        "head_dim": 512,
        "rope_head_dim": 64,
        "compress_ratio": 128,
        "overlap": False,
        "use_fp4_cache": False,
        "rms_norm_weight": torch.zeros(512).bfloat16(),
        "rms_norm_eps": 1e-6,
        "quant_block": 64,
        "token_stride": 576,
        "scale_dim": 8,
        **changes,
    }


def test_our_compressor_is_given_what_vllms_would_be(cuda, monkeypatch):
    from vllm_sm12x.adapters import compressor

    called = Mock()
    monkeypatch.setattr(compressor, "compress_to_cache", called)
    given = compressor_arguments()
    assert compressor.compress_norm_rope_store(**given) is None
    found = inspect.signature(compress_to_cache).bind(*called.call_args.args).arguments
    assert called.call_args.kwargs == {"implementation": "triton"}
    names = {
        "state_cache": "state_cache",
        "token_to_request": "token_to_req_indices",
        "positions": "positions",
        "block_table": "block_table",
        "norm_weight": "rms_norm_weight",
        "eps": "rms_norm_eps",
        "cos_sin_cache": "cos_sin_cache",
        "cache": "kv_cache",
        "compress_ratio": "compress_ratio",
        "overlap": "overlap",
    }
    for ours, theirs in names.items():
        assert found.pop(ours) is given[theirs], ours
    assert found.pop("slots") is given["k_cache_metadata"].slot_mapping
    assert found.pop("state_slots").shape == (5,)
    assert not found


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("head_dim", 128, 512),
        ("rope_head_dim", 32, 64),
        ("use_fp4_cache", True, False),
        ("quant_block", 128, 64),
        ("token_stride", 640, 576),
        ("scale_dim", 7, 8),
        ("block_size", 4, 8),
        ("state_width", 1024, 512),
    ],
)
def test_another_layout_is_an_error(cuda, name, value, allowed):
    from vllm_sm12x.adapters import compressor

    message = f"{name}: {value}, allowed in the portable compressor: {allowed}"
    with pytest.raises(ValueError, match=message):
        compressor.compress_norm_rope_store(**compressor_arguments(**{name: value}))


def test_our_compressor_takes_vllms_tensors(cuda):
    """All checks pass; what is missing is the GPU."""
    from vllm_sm12x.adapters import compressor

    with pytest.raises(ValueError, match="device cpu, allowed in the Triton compressor: cuda"):
        compressor.compress_norm_rope_store(**compressor_arguments())


@pytest.mark.operation("cutedsl")
@pytest.mark.parametrize("installed", [True, False])
def test_the_gather_of_keys(portable, installed, monkeypatch):
    from vllm.models.deepseek_v4.common.ops import cache_utils

    cute = stub_module(
        monkeypatch, "dequant_gather_k_cutedsl", "dequantize_and_gather_k_cache_cutedsl"
    ).dequantize_and_gather_k_cache_cutedsl
    triton = Mock()
    monkeypatch.setattr(cache_utils, "dequantize_and_gather_k_cache_triton", triton)
    monkeypatch.setattr(cache_utils, "has_cutedsl", lambda: installed)
    out, cache, lens, gather_lens, table = (object() for _ in range(5))
    result = cache_utils.dequantize_and_gather_k_cache(
        out,
        cache,
        seq_lens=lens,
        gather_lens=gather_lens,
        block_table=table,
        block_size=64,
        offset=7,
    )
    assert result is None
    taken, left = (cute, triton) if installed and not portable else (triton, cute)
    taken.assert_called_once_with(out, cache, lens, gather_lens, table, 64, 7)
    left.assert_not_called()


@pytest.mark.operation("cutedsl")
@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("use_fp4", [False, True])
def test_the_indexers_query(portable, installed, use_fp4, monkeypatch):
    from vllm.models.deepseek_v4.common.ops import fused_indexer_q

    cute = stub_module(
        monkeypatch,
        "fused_indexer_q_cutedsl",
        "fused_indexer_q_rope_quant_fp8_cutedsl",
        "fused_indexer_q_rope_quant_mxfp4_cutedsl",
    )
    fp8, fp4 = Kernel(), Kernel()
    monkeypatch.setattr(fused_indexer_q, "_fused_indexer_q_rope_quant_kernel", fp8)
    monkeypatch.setattr(fused_indexer_q, "_fused_indexer_q_rope_mxfp4_kernel", fp4)
    monkeypatch.setattr(fused_indexer_q, "has_cutedsl", lambda: installed)
    positions = torch.arange(3)
    q = torch.randn(3, 2, 128).to(torch.bfloat16)
    table, weights = torch.randn(8, 64), torch.randn(3, 2)
    quantised, folded = fused_indexer_q.fused_indexer_q_rope_quant(
        positions, q, table, weights, 0.5, 0.25, use_fp4=use_fp4
    )
    assert (folded.shape, folded.dtype) == ((3, 2), torch.float32)
    native = {
        False: cute.fused_indexer_q_rope_quant_fp8_cutedsl,
        True: cute.fused_indexer_q_rope_quant_mxfp4_cutedsl,
    }
    kernels = {False: fp8, True: fp4}
    assert not native[not use_fp4].called
    assert not kernels[not use_fp4].launch.called
    if installed and not portable:
        assert not kernels[use_fp4].launch.called
        (arguments,) = [call.args for call in native[use_fp4].call_args_list]
        assert arguments[:6] == (positions, q, table, weights, 0.5, 0.25)
        assert arguments[-1] is folded
    else:
        assert not native[use_fp4].called
        assert kernels[use_fp4].grid == (3, 2)
        arguments = kernels[use_fp4].launch.call_args.args
        assert arguments[:2] == (positions, q)
        assert any(argument is folded for argument in arguments)
    if use_fp4:
        values, scales = quantised
        assert (values.shape, values.dtype) == ((3, 2, 64), torch.uint8)
        assert (scales.shape, scales.dtype) == ((3, 2), torch.int32)
        assert any(argument is values for argument in arguments)
    else:
        assert (quantised.shape, quantised.dtype) == ((3, 2, 128), torch.float8_e4m3fn)
        assert any(argument is quantised for argument in arguments)
