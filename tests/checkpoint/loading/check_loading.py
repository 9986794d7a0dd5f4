"""Load a checkpoint with vLLM's own loader on a machine without a GPU, and report what came of it.

    python -m tests.checkpoint.loading.check_loading FOLDER 1 [FOLDER TP …]

Runs in a process of its own: it fakes the CUDA platform that the model asks for while it is built.
Nothing of the model runs. The model and its MTP draft are built and loaded twice for each rank of
TP, into memory that was filled with zeros and with ones: an element that differs afterwards was
never loaded. Prints a JSON list, for each pair of arguments ``{"error": …}``, or one
``{"model": …, "draft": …}`` a rank, each a :class:`Loaded`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch


@dataclasses.dataclass
class Loaded:
    """What one rank's model, or draft model, holds after loading.

    ``parameters`` maps names to ``[dtype, shape, digest of the bytes]``; ``partly`` names those of
    which some element was never written; ``unclaimed`` those that the loader does not report.
    ``rotations`` has, for each module with a rotary table, its rows at :data:`POSITIONS`.
    """

    parameters: dict[str, list[Any]]
    partly: list[str]
    unclaimed: list[str]
    rotations: dict[str, list[list[float]]]


# Positions whose rotation is reported.
POSITIONS = (0, 1, 127, 4095, 100_000)


def fake_platform(capability: tuple[int, int] = (9, 0)) -> None:
    """Make vLLM believe in a GPU, by default Hopper, before any of its modules asks."""
    for name in ("vllm._C", "vllm._C_stable_libtorch"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
    import vllm.platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class FakeGpu(CudaPlatformBase):
        # Parameters are made on the CPU; all else is as on CUDA.
        device_type = "cpu"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "fake"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return False

    vllm.platforms._current_platform = FakeGpu()
    vllm.platforms.current_platform = vllm.platforms._current_platform

    # Attention modules bind these names while they are imported, and call none of them here.
    flash_attn = types.ModuleType("vllm.vllm_flash_attn")
    for name in (
        "fa_version_unsupported_reason",
        "flash_attn_varlen_func",
        "get_scheduler_metadata",
        "is_fa_version_supported",
    ):
        setattr(flash_attn, name, None)
    sys.modules["vllm.vllm_flash_attn"] = flash_attn

    import vllm._custom_ops

    # Modules ask these of the binaries while they are imported.
    for probe in (
        "cutlass_scaled_mm_supports_fp8",
        "cutlass_scaled_mm_supports_block_fp8",
        "cutlass_group_gemm_supported",
    ):
        setattr(vllm._custom_ops, probe, lambda capability: True)

    # Layers bind it while they are built.
    torch.ops._C.silu_and_mul_with_clamp = None

    class NoStream:
        def __init__(self, *args: object, **kwargs: object) -> None:
            pass

    torch.cuda.Stream = NoStream
    torch.cuda.Event = NoStream


def engine_config(folder: Path, tp: int) -> Any:
    """The configuration of an engine that serves ``folder`` with MTP."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(folder),
        tokenizer_mode="deepseek_v4",
        kv_cache_dtype="fp8",
        block_size=256,
        max_model_len=4096,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        enforce_eager=True,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
    ).create_engine_config()
    # Afterwards: for more ranks than one, the configuration asks the GPUs what connects them.
    config.parallel_config.tensor_parallel_size = tp
    return config


def be_rank(tp: int, rank: int) -> None:
    """Stand in for the process group: what is loaded depends on its size and rank alone."""
    from vllm.distributed import parallel_state

    single = types.SimpleNamespace(
        world_size=1, rank_in_group=0, is_first_rank=True, is_last_rank=True, device_group=None
    )
    for name in ("_PP", "_DP", "_EP", "_DCP", "_PCP"):
        setattr(parallel_state, name, single)
    parallel_state._TP = types.SimpleNamespace(world_size=tp, rank_in_group=rank, device_group=None)


def load(config: Any, model_config: Any, fill: int) -> tuple[torch.nn.Module, set[str]]:
    """Build the model that ``model_config`` names and run its ``load_weights``."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    # Layer names are registered once; this model is one of several in the process.
    config.compilation_config.static_forward_context.clear()
    with set_default_torch_dtype(model_config.dtype), set_current_vllm_config(config):
        model = initialize_model(vllm_config=config, model_config=model_config)
    for name, parameter in model.named_parameters():
        # What no rank's checkpoint rows fill must stay -inf: heads that only pad.
        if not name.endswith("attn_sink"):
            parameter.data.view(torch.uint8).fill_(fill)
    loader = DefaultModelLoader(config.load_config)
    return model, model.load_weights(loader.get_all_weights(model_config, model))


def examine(config: Any, model_config: Any) -> Loaded:
    """Load twice over different contents and compare."""
    zeros, claimed = load(config, model_config, 0x00)
    ones, _ = load(config, model_config, 0xFF)
    first, second = (
        {name: value.data.contiguous().view(torch.uint8) for name, value in m.named_parameters()}
        for m in (zeros, ones)
    )
    return Loaded(
        parameters={
            name: [str(value.dtype), list(value.shape), _digest(value.data)]
            for name, value in zeros.named_parameters()
        },
        partly=[name for name in first if not torch.equal(first[name], second[name])],
        unclaimed=sorted(first.keys() - claimed),
        rotations={
            name: module.cos_sin_cache[list(POSITIONS)].tolist()
            for name, module in zeros.named_modules(remove_duplicate=False)
            if isinstance(getattr(module, "cos_sin_cache", None), torch.Tensor)
        },
    )


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def report(folder: Path, tp: int) -> list[dict[str, Any]] | dict[str, str]:
    """Load the model and its draft for every rank; an error of the loader is reported too."""
    found = []
    try:
        config = engine_config(folder, tp)
        for rank in range(tp):
            be_rank(tp, rank)
            draft = config.speculative_config.draft_model_config
            found.append(
                {
                    "model": dataclasses.asdict(examine(config, config.model_config)),
                    "draft": dataclasses.asdict(examine(config, draft)),
                }
            )
    except Exception as error:  # whatever vLLM raises is the outcome
        return {"error": f"{type(error).__name__}: {error}"}
    return found


def main() -> int:
    """Report every pair of a folder and a TP size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="+", metavar="FOLDER TP")
    words = parser.parse_args().jobs
    if len(words) % 2:
        parser.error("give a TP size after each folder")
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    torch.set_num_threads(2)
    fake_platform()
    jobs = zip(words[::2], words[1::2], strict=True)
    print(json.dumps([report(Path(folder), int(tp)) for folder, tp in jobs]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
