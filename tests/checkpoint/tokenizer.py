"""A byte-level tokenizer with DeepSeek V4's special tokens, for a vocabulary of any size.

Any text can be encoded, a byte a token, and every token id has a text: above the bytes, each id is
a made-up word. The words are for reading what a model with random weights says; no text encodes to
them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
# In the order of their ids, after the three above.
SPECIAL = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜latest_reminder｜>",
    *(f"<｜{task}｜>" for task in ("action", "query", "authority", "domain", "title", "read_url")),
)
# Single tokens as well, but part of the text that parsers read.
VISIBLE = ("<think>", "</think>", "｜DSML｜")


def write_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for a model's configuration.

    Raises:
        ValueError: The configuration's BOS and EOS are not ids 0 and 1, or its vocabulary is too
            small for the bytes and the special tokens.
    """
    for name, wanted in (("bos_token_id", 0), ("eos_token_id", 1)):
        if config[name] != wanted:
            raise ValueError(f"{name}: {config[name]}, allowed: {wanted}")
    make_tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly ``vocab_size`` tokens.

    Raises:
        ValueError: ``vocab_size`` is below the bytes and the special tokens.
    """
    added = [BOS, EOS, PAD, *SPECIAL, *VISIBLE]
    tokens = [*added, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if vocab_size < len(tokens):
        raise ValueError(f"vocab_size: {vocab_size}, allowed: {len(tokens)} and more")
    words = _words()
    tokens += [next(words) for _ in range(vocab_size - len(tokens))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (BOS, EOS, PAD, *SPECIAL)])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in VISIBLE])
    return tokenizer


def _words() -> Iterator[str]:
    """``Ġba``, ``Ġbe``, … ``Ġbaba``, …: distinct, with the byte alphabet's sign for a space."""
    syllables = [a + b for a, b in product("bdfgklmnprstvz", "aeiou")]
    length = 1
    while True:
        for parts in product(syllables, repeat=length):
            yield "Ġ" + "".join(parts)
        length += 1
