"""Which engines count as DeepSeek V4 with MTP, on vLLM's own configuration objects."""

from __future__ import annotations

import json

import pytest

from tests.engine.flash_config import flash_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flash")
    (folder / "config.json").write_text(json.dumps(flash_config()))
    return folder


@pytest.mark.parametrize(
    ("drafting", "expected"),
    [
        ({"method": "mtp", "num_speculative_tokens": 2}, True),
        ({"method": "deepseek_mtp", "num_speculative_tokens": 1}, True),  # its older name
        ({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 4}, False),
        (None, False),
    ],
)
def test_the_flash_checkpoint(choose, checkpoint, drafting, expected):
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig

    from vllm_sm12x.adapters import mtp

    choose((12, 0), None)
    model = ModelConfig(
        model=str(checkpoint), skip_tokenizer_init=True, max_model_len=4096, dtype="bfloat16"
    )
    if drafting is not None:
        drafting = SpeculativeConfig(
            target_model_config=model, target_parallel_config=ParallelConfig(), **drafting
        )
    # What follows in VllmConfig's own checks hangs on the platform, and is not the subject here.
    config = object.__new__(VllmConfig)
    config.model_config, config.speculative_config = model, drafting
    assert mtp.is_deepseek_v4_mtp(config) is expected
