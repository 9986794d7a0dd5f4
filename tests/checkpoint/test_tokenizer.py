"""The tokenizer, as vLLM's ``deepseek_v4`` mode loads it."""

import json

import pytest

from tests.checkpoint.sizes import config_of
from tests.checkpoint.tokenizer import make_tokenizer, write_tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
MESSAGES = [
    {"role": "user", "content": "Größe 7 in 東京?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "1",
                "type": "function",
                "function": {"name": "weather", "arguments": json.dumps({"city": "東京"})},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
]


@pytest.fixture(scope="module")
def loaded(tiny):
    from vllm.tokenizers.deepseek_v4 import DeepseekV4Tokenizer

    return DeepseekV4Tokenizer.from_pretrained(str(tiny))


def test_vllm_loads_it_with_every_id_named(loaded, tiny):
    size = json.loads((tiny / "config.json").read_text())["vocab_size"]
    assert len(loaded.get_vocab()) == size
    assert set(loaded.get_vocab().values()) == set(range(size))
    assert (loaded.bos_token_id, loaded.eos_token_id) == (0, 1)
    decoded = [loaded.decode([number]) for number in range(size)]
    assert all(decoded)


@pytest.mark.parametrize("thinking", [False, True])
def test_a_chat_survives(loaded, thinking):
    from vllm.tokenizers.deepseek_v4_encoding import encode_messages

    ids = loaded.apply_chat_template(list(MESSAGES), tools=TOOLS, thinking=thinking)
    system = {"role": "system", "tools": TOOLS}
    mode = "thinking" if thinking else "chat"
    text = encode_messages([system, *MESSAGES], thinking_mode=mode, reasoning_effort="high")
    assert loaded.decode(ids) == text
    for token in ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "｜DSML｜"):
        assert text.count(token) == ids.count(loaded.convert_tokens_to_ids(token)) > 0
    for token in ("<think>", "</think>"):
        assert text.count(token) == ids.count(loaded.convert_tokens_to_ids(token))
    assert ids[0] == 0


def test_every_special_token_of_the_encoding_is_one_token(loaded):
    from vllm.tokenizers import deepseek_v4_encoding as encoding

    tokens = [
        *(encoding.bos_token, encoding.eos_token, encoding.dsml_token),
        *(encoding.thinking_start_token, encoding.thinking_end_token),
        *(encoding.USER_SP_TOKEN, encoding.ASSISTANT_SP_TOKEN),
        encoding.LATEST_REMINDER_SP_TOKEN,
        *encoding.DS_TASK_SP_TOKENS.values(),
    ]
    assert [len(loaded.encode(token, add_special_tokens=False)) for token in tokens] == [1] * 14


def test_what_parsers_read_is_not_skipped(loaded):
    ids = loaded.encode("<think>a</think>｜DSML｜<｜User｜>", add_special_tokens=False)
    assert loaded.decode(ids, skip_special_tokens=True) == "<think>a</think>｜DSML｜"


def test_any_vocabulary_has_distinct_texts():
    vocabulary = make_tokenizer(129280).get_vocab()
    assert sorted(vocabulary.values()) == list(range(129280))


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size: 200, allowed: 271 and more"):
        make_tokenizer(200)
    config = config_of("tiny") | {"eos_token_id": 2}
    with pytest.raises(ValueError, match="eos_token_id: 2, allowed: 1"):
        write_tokenizer(tmp_path, config)
