"""Prompts and bad words are encoded at once, by the renderer that vLLM makes for DeepSeek V4."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

from tests.checkpoint.tokenizer import write_tokenizer
from tests.engine.flash_config import flash_config

LONGEST = 131_072
BAD_WORDS = ("sea", "wind", "two words")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint without weights: configuration and tokenizer."""
    place = tmp_path_factory.mktemp("checkpoint")
    config = flash_config()
    (place / "config.json").write_text(json.dumps(config))
    write_tokenizer(place, config)
    return place


@pytest.fixture(params=[1, 3], ids=["1 worker", "3 workers"])
def renderer(request, folder):
    from vllm.config import ModelConfig
    from vllm.renderers.registry import renderer_from_config

    model = ModelConfig(
        str(folder),
        tokenizer_mode="deepseek_v4",
        max_model_len=LONGEST,
        dtype="bfloat16",
        renderer_num_workers=request.param,
    )
    made = renderer_from_config(
        SimpleNamespace(
            model_config=model,
            parallel_config=SimpleNamespace(_api_process_rank=0),
            observability_config=None,
        )
    )
    yield made
    made.shutdown()


@pytest.fixture
def alone(folder):
    """A tokenizer that nobody else has."""
    from vllm.tokenizers.deepseek_v4 import DeepseekV4Tokenizer

    return DeepseekV4Tokenizer.from_pretrained(str(folder))


def bad_words(tokenizer):
    from vllm import SamplingParams

    params = SamplingParams(bad_words=list(BAD_WORDS))
    params.update_from_tokenizer(tokenizer)
    return params.bad_words_token_ids


def test_bad_words_while_long_prompts_are_encoded(renderer, alone):
    """As the API server does: prompts in worker threads, sampling parameters in the event loop."""
    from vllm.renderers.params import TokenizeParams

    params = TokenizeParams(max_total_tokens=LONGEST, max_output_tokens=16)
    texts = [f"{number} salt winds over the sea " * 4000 for number in range(3)]
    expected = bad_words(alone)

    async def serve():
        prompts = asyncio.gather(
            *(renderer._tokenize_prompt_async({"prompt": text}, params) for text in texts)
        )
        meanwhile = []
        while not prompts.done():
            meanwhile.append(bad_words(renderer.get_tokenizer()))
            await asyncio.sleep(0)
        return meanwhile, await prompts

    meanwhile, prompts = asyncio.run(serve())
    # Else nothing was encoded at the same time.
    assert len(meanwhile) > 10
    assert all(words == expected for words in meanwhile)
    for text, prompt in zip(texts, prompts, strict=True):
        assert prompt["prompt_token_ids"] == alone.encode(text)


def test_the_tokenizer_is_what_the_parsers_expect(renderer, alone):
    """vLLM's cached properties and DeepSeek's own template outlive the pool."""
    tokenizer = renderer.get_tokenizer()
    assert len(tokenizer) == len(alone)
    assert tokenizer.max_token_id == alone.max_token_id
    assert tokenizer.max_chars_per_token == alone.max_chars_per_token
    assert tokenizer.get_vocab() == alone.get_vocab()
    assert tokenizer.all_special_ids == alone.all_special_ids
    # Not the tokenizer's own: vLLM asks for it when it loads one for generation.
    assert tokenizer.truncation_side == "left"
    asked = [{"role": "user", "content": "How deep is the sea?"}]
    for thinking in (False, True):
        assert tokenizer.apply_chat_template(asked, thinking=thinking) == alone.apply_chat_template(
            asked, thinking=thinking
        )
    ids = alone.encode("How deep is the sea?")
    assert tokenizer.decode(ids) == alone.decode(ids)
