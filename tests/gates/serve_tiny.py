"""``python serve_tiny.py FOLDER PORT``: the server of ``transformers serve`` with a tiny model.

Run by the environment of the wheel, which has torch and transformers. The model is a Llama with a
byte tokenizer and a chat template, made on the spot: random weights, seeded, nothing downloaded.
"""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.cli import serve
from transformers.cli.serving import model_manager

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class OnTheCpu(model_manager.ModelManager):
    """Loads to the CPU. A device map, which the command line insists on, needs `accelerate`."""

    def _load_model(self, *arguments, **named):
        self.device = None
        return super()._load_model(*arguments, **named)


def make(folder):
    """Write model and tokenizer into a folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    # It speaks to the length that is asked for.
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


if __name__ == "__main__":
    path, port = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    make(path)
    model_manager.ModelManager = OnTheCpu
    serve.Serve(force_model=path, device="cpu", host="127.0.0.1", port=port, log_level="warning")
