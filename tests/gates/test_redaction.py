"""No secret is kept, and no setting that matters is lost."""

from __future__ import annotations

import pytest

from gates.redaction import command, settings


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["serve", "--api-key", "S"], ["serve", "--api-key", "***"]),
        (["--api-key=S", "--port", "80"], ["--api-key=***", "--port", "80"]),
        (["--api-key", "S", "S2", "--port", "80"], ["--api-key", "***", "***", "--port", "80"]),
        (["--api-key", "-S", "--port", "80"], ["--api-key", "***", "--port", "80"]),
        (["--hf-token", "S"], ["--hf-token", "***"]),
        (["--hf_token=S"], ["--hf_token=***"]),
        (["env", "HF_TOKEN=S", "vllm"], ["env", "HF_TOKEN=***", "vllm"]),
        (["sh", "-c", "vllm --api-key S --port 80"], ["sh", "-c", "vllm --api-key *** --port 80"]),
        (["sh", "-c", "vllm --api-key 'S S'"], ["sh", "-c", "vllm --api-key ***"]),
        (["--header", "Authorization: Bearer S"], ["--header", "Authorization: Bearer ***"]),
    ],
)
def test_secrets_of_a_command_are_hidden(given, kept):
    assert command(given) == kept


def test_the_rest_of_a_command_is_as_it_was():
    given = ["vllm", "serve", "a model", "--tokenizer-mode", "deepseek_v4", "--tokenizer=x"]
    given += ["--max-num-batched-tokens", "4096", "--speculative-config", '{"tokens":2}']
    assert command(given) == given


def test_settings_are_those_that_a_server_takes_over_and_no_secret():
    wanted = {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "NCCL_P2P_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "SM12X_PORTABLE": "all",
        "TORCH_CUDA_ARCH_LIST": "12.0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    secret = {"VLLM_API_KEY": "S", "NCCL_X_TOKEN": "S", "TORCH_SECRET": "S", "VLLM_PASSWORD": "S"}
    other = {"PATH": "/bin", "HOME": "/root", "OPENAI_API_KEY": "S"}
    assert settings(wanted | secret | other) == wanted
