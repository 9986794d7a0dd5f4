"""``python -m tests.gates.made_tokenizer FOLDER``: counts prompts as vLLM would with made weights.

Run by the environment of the wheel. It writes the tokenizer of ``tests.checkpoint`` into the
folder, loads it as vLLM's ``deepseek_v4`` mode does, and answers each line of JSON messages on
standard input with a line: their tokens, chat template included.
"""

import json
import os
import sys
from pathlib import Path

from tests.checkpoint.sizes import config_of
from tests.checkpoint.tokenizer import write_tokenizer


def main(folder: Path) -> None:
    """Count until the input ends."""
    # vLLM logs to standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm.tokenizers.deepseek_v4 import DeepseekV4Tokenizer

    config = config_of("tiny")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder, config)
    tokenizer = DeepseekV4Tokenizer.from_pretrained(str(folder))
    for line in sys.stdin:
        print(len(tokenizer.apply_chat_template(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
