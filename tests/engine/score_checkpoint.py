"""Load a checkpoint with vLLM's own loader and store the log-probabilities that the engine gives.

    python -m tests.checkpoint --size small FOLDER
    python tests/engine/score_checkpoint.py FOLDER --out portable.npz
    python tests/engine/score_checkpoint.py FOLDER --out native.npz --path native --tp 2

Every sequence of `tests/oracle/sequences.py` is prefilled up to its prompt's end, and its other
tokens are fed one at a time, so that both attention paths are scored. `python -m tests.oracle
compare` holds what is stored against the oracle or another run. Needs a CUDA GPU, and the wheel
installed. Tripwires make calls into native kernels an error on the portable path, as in
`run_engine.py`, but not with --tp: they act in this process alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence as Listed
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
# For `tests.…`, here and in the processes of --tp.
sys.path.insert(0, str(HERE.parents[1]))

from environment import (  # noqa: E402
    TP_COMPILATION,
    add_path_options,
    commit,
    machine,
    memory_options,
    now,
    prepare,
    settings,
)
from tests.checkpoint.digest import digest  # noqa: E402
from tests.oracle.scores import MOST_KEPT, Scores  # noqa: E402
from tests.oracle.sequences import PROMPT_LENGTHS, Sequence, draw_sequences  # noqa: E402

# Below the longest prompts, so that they are read in chunks.
MAX_BATCHED_TOKENS = 2048


def start(args: argparse.Namespace, longest: int) -> Any:
    """The engine, with the options of ``run_engine.py`` and no ``load_format``."""
    from vllm import LLM

    return LLM(
        model=str(args.folder),
        tokenizer_mode="deepseek_v4",
        tensor_parallel_size=args.tp,
        kv_cache_dtype="fp8",
        block_size=256,
        max_model_len=longest + 2,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        max_num_seqs=args.together,
        **memory_options(args),
        enable_prefix_caching=False,
        enforce_eager=args.eager,
        compilation_config={
            "cudagraph_capture_sizes": [n for n in (1, 2, 4, 8) if n <= args.together],
            **(TP_COMPILATION if args.tp > 1 else {}),
        },
        max_logprobs=MOST_KEPT,
        logits_processors=["tests.engine.forced_tokens:ForcedTokens"],
        # The processor counts the tokens that came out so far.
        async_scheduling=False,
        seed=0,
    )


def score(llm: Any, sequences: Listed[Sequence], kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and log-probabilities ``[P, kept]`` as :class:`Scores` takes them."""
    from vllm import SamplingParams

    from tests.engine.forced_tokens import FORCED

    wanted = [
        SamplingParams(
            temperature=0.0,
            # One more than is fed: the prediction after the last token.
            max_tokens=len(sequence.tokens) - sequence.prompt + 1,
            ignore_eos=True,
            logprobs=kept,
            prompt_logprobs=kept,
            flat_logprobs=True,
            detokenize=False,
            extra_args={FORCED: list(sequence.tokens[sequence.prompt :])},
        )
        for sequence in sequences
    ]
    prompts = [{"prompt_token_ids": list(s.tokens[: s.prompt])} for s in sequences]
    outputs = llm.generate(prompts, wanted, use_tqdm=False)
    parts = [
        part
        for sequence, output in zip(sequences, outputs, strict=True)
        for part in _of_one(sequence, output, kept)
    ]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([lp for _, lp in parts])


def _of_one(sequence: Sequence, output: Any, kept: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the prompt and the fed tokens of one sequence gave, in this order.

    Raises:
        ValueError: The engine went on with other tokens, or left positions out.
    """
    (answer,) = output.outputs
    fed = list(sequence.tokens[sequence.prompt :])
    if list(answer.token_ids[:-1]) != fed:
        raise ValueError(f"a prompt of {sequence.prompt}: the engine did not go on as it was told")
    prompt = _flat(output.prompt_logprobs, kept)
    answered = _flat(answer.logprobs, kept)
    if (len(prompt[0]), len(answered[0])) != (sequence.prompt - 1, len(fed) + 1):
        raise ValueError(f"a prompt of {sequence.prompt}: positions are missing in the answer")
    return [prompt, answered]


def _flat(logprobs: Any, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrays ``[P, kept]`` from vLLM's flat form: at each position the token that came, and then
    the likeliest. The first token of a prompt has none."""
    ids = np.array(logprobs.token_ids, np.int32).reshape(-1, kept + 1)[:, 1:]
    values = np.array(logprobs.logprobs, np.float32).reshape(-1, kept + 1)[:, 1:]
    return ids, values


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the run, as .npz")
    add_path_options(parser)
    parser.add_argument("--tp", type=int, default=1, help="GPUs (default: 1)")
    parser.add_argument(
        "--prompts",
        type=lambda text: tuple(int(n) for n in text.split(",")),
        default=PROMPT_LENGTHS,
        metavar="N,N,…",
        help="lengths of the prompts (default: %(default)s)",
    )
    parser.add_argument(
        "--together",
        type=int,
        default=8,
        help="sequences at once (default: 8); another number shows what the batch changes",
    )
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs, no torch.compile")
    args = parser.parse_args()
    if not (args.folder / "config.json").is_file():
        parser.error(f"{args.folder}: no checkpoint there")
    for name in ("tp", "together"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: allowed: 1 and more")
    return args


def main() -> int:
    args = arguments()
    guarded = prepare(args)
    if guarded:
        import tripwire

    config = json.loads((args.folder / "config.json").read_text(encoding="utf-8"))
    vocab_size = config["vocab_size"]
    kept = min(vocab_size, MOST_KEPT)
    sequences = draw_sequences(vocab_size, args.prompts)
    began = time.perf_counter()
    llm = start(args, max(len(sequence.tokens) for sequence in sequences))
    start_s = time.perf_counter() - began
    print(f"engine ready after {start_s:.1f} s", flush=True)
    began = time.perf_counter()
    tokens, logprobs = score(llm, sequences, kept)
    score_s = time.perf_counter() - began
    if guarded and tripwire.calls:
        print(f"native kernels were called: {sorted(set(tripwire.calls))[:5]}", file=sys.stderr)
        return 1
    scores = Scores(
        checkpoint=digest(args.folder),
        sequences=sequences,
        tokens=tokens,
        logprobs=logprobs,
        vocab_size=vocab_size,
        facts={
            "implementation": "vllm",
            **machine(),
            **settings(),
            "tripwires": guarded,
            "tp": args.tp,
            "together": args.together,
            "eager": args.eager,
            "commit": args.commit or commit(),
            "date": now(),
            "start_s": round(start_s, 1),
            "score_s": round(score_s, 1),
        },
    )
    scores.save(args.out)
    print(f"{args.out.name}: {len(tokens)} positions in {score_s:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
