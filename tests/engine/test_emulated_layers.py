"""Every layer of the engine on the emulated GPU alone, against the oracle.

A layer has two parts, its attention and its experts, numbered ``2 * layer`` and one more. A part
mixes the streams and adds its output to each with a factor. So the difference of two results splits
in two: along those factors the outputs differ, by 1 to 4 % from the rounding to FP8 alone; across
them only the mixing does, where rounding to bfloat16 makes 0.14 %.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from benchmarks.engine.model import compress_ratios
from tests.checkpoint.sizes import config_of
from tests.checkpoint.writer import write_checkpoint
from without_gpu import succeed

CHANGES = {
    # YaRN's turning points at the distances that so few tokens have.
    "rope_scaling": config_of("tiny")["rope_scaling"] | {"original_max_position_embeddings": 512},
    # About half of what there is to select from.
    "index_topk": 32,
}
# One entry of C128A among 128 keys would be lost in the noise of the others.
LOUD, LOUDER = "layers.2.attn.compressor.norm.weight", 3

# The parts that a fault changes, of layers with the window only (0), C4A (1) and C128A (2).
ATTENTION = (0, 2, 4)
FAULTS = {
    "window_yarn": (0,),
    "no_yarn": (2, 4),
    "window_127": ATTENTION,
    "half_the_entries": (2,),
    "late_entries": (2, 4),
    "no_position_bias": (2, 4),
    "no_sinks": ATTENTION,
    # The first part's streams are all alike, so that it does not matter how it mixes them.
    "sinkhorn_3": (1, 2, 3, 4, 5),
    # Of the layers whose experts are not chosen by the token alone, and of all.
    "no_router_bias": (3, 5),
    "no_routed_scale": (1, 3, 5),
    "one_scale": ATTENTION,
}

# What the kernels take has experts that are not chosen by the token alone in the last layer only.
KERNELS_FAULTS = FAULTS | {"no_router_bias": (5,)}
KERNELS = {
    *("split_kernel", "prefill_kernel", "logits_kernel", "paged_logits_kernel"),
    *("einsum_kernel", "mix_kernel", "finish_kernel", "post_kernel"),
    *("product_kernel", "weighted_sum_kernel", "compress_kernel"),
}

# The engine's noise is another draw than the rounded oracle's. A median over hundreds of tokens
# moves little; the tail holds tokens for which rounding chose another entry or expert.
MEDIAN_FACTOR, TAIL_FACTOR, FED_FACTOR = 1.15, 1.5, 1.5
# Of a fault in the engine's difference. Seen: at most 0.02, and standard errors up to 0.016. One
# other choice of an entry can outweigh a thousand values that are right.
LARGEST_SHARE, LARGEST_ERROR = 0.2, 0.1


@dataclass(frozen=True)
class Case:
    """A checkpoint, the form of our operations, and what is read.

    Attributes:
        faults: The parts that each changes; nothing where none is looked for.
        prompt: Tokens of the prompt. Faults of C128A need two entries of it.
        fed: Tokens that are fed one at a time.
        changes: Of the size's configuration, besides ``CHANGES``.
    """

    size: str
    kernels: str
    faults: dict[str, tuple[int, ...]]
    prompt: int = 270
    fed: int = 12
    changes: dict[str, Any] = field(default_factory=dict)


CASES = {
    "PyTorch": Case("tiny", "none", FAULTS),
    "kernels": Case("small", "all", KERNELS_FAULTS),
}
# Only with --long: as many entries as the published model selects, of 554, and as many layers as it
# has, in its order.
LONG = {
    "512 entries": Case(
        "small", "all", KERNELS_FAULTS, prompt=2200, fed=16, changes={"index_topk": 512}
    ),
    "43 layers": Case(
        "small",
        "all",
        {},
        prompt=140,
        fed=4,
        changes={"compress_ratios": compress_ratios(43), "num_hash_layers": 3},
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = CASES | (LONG if metafunc.config.getoption("long", default=False) else {})
    if "fault" in metafunc.fixturenames:
        wanted = {name: case for name, case in wanted.items() if case.faults}
    metafunc.parametrize("layers", wanted.values(), ids=wanted, indirect=True, scope="module")


@dataclass(frozen=True)
class Layers:
    """Streams after each part of each layer, each float64 ``[parts, tokens, hc_mult, hidden]``.

    Attributes:
        case: What was asked.
        engine: The engine's.
        results: The oracle's from the same streams before the part: ``exact``, ``rounded``, and a
            fault's name.
        places: ``[parts, tokens, hc_mult]``, of length 1: the direction in which a part's output is
            placed.
    """

    case: Case
    engine: np.ndarray
    results: dict[str, np.ndarray]
    places: np.ndarray

    def split(self, change: np.ndarray) -> dict[str, np.ndarray]:
        """Along the factors of the output, ``[parts, tokens, hidden]``, and across them,
        ``[parts, tokens, hc_mult * hidden]``."""
        along = np.einsum("pts,ptsh->pth", self.places, change)
        across = change - self.places[..., None] * along[:, :, None]
        return {"output": along, "mixing": across.reshape(*along.shape[:2], -1)}

    def errors(self, streams: np.ndarray) -> dict[str, np.ndarray]:
        """``[parts, tokens]``: how far from the exact ones, relative to these."""
        exact = self.results["exact"]
        size = np.linalg.norm(exact.reshape(*exact.shape[:2], -1), axis=-1)
        return {
            kind: np.linalg.norm(change, axis=-1) / size
            for kind, change in self.split(streams - exact).items()
        }


@pytest.fixture(scope="module")
def layers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Layers:
    case: Case = request.param
    folder = tmp_path_factory.mktemp("layers")
    checkpoint = folder / case.size
    write_checkpoint(checkpoint, config_of(case.size, CHANGES | case.changes))
    (shard,) = checkpoint.glob("*.safetensors")
    tensors = load_file(shard)
    tensors[LOUD] *= LOUDER
    save_file(tensors, shard, metadata={"format": "pt"})
    seen, computed = folder / "seen.npz", folder / "computed.npz"
    printed = succeed(
        *("tests.engine.emulated.layers", checkpoint, "--out", seen),
        *("--prompt", case.prompt, "--fed", case.fed, "--kernels", case.kernels),
    )
    launched = {line.split()[-1] for line in printed.splitlines() if line}
    assert launched.isdisjoint(KERNELS) if case.kernels == "none" else launched >= KERNELS
    # Not in this process: other tests import vLLM into it, which changes transformers.
    succeed("tests.oracle.layers", checkpoint, seen, "--out", computed)
    with np.load(seen, allow_pickle=False) as stored:
        engine = stored["streams"][1:].astype(np.float64)
    with np.load(computed, allow_pickle=False) as stored:
        results = {name: stored[name].astype(np.float64) for name in stored.files}
    places = results.pop("places")
    assert results.keys() - FAULTS.keys() == {"exact", "rounded"}
    return Layers(case, engine, results, places / np.linalg.norm(places, axis=-1, keepdims=True))


@pytest.mark.slow
def test_no_part_is_further_away_than_its_formats_explain(layers):
    seen, noise = layers.errors(layers.engine), layers.errors(layers.results["rounded"])
    read, fed = slice(None, layers.case.prompt), slice(layers.case.prompt, None)
    judged = [
        ("prefill, median", read, 0.5, MEDIAN_FACTOR),
        ("prefill, tail", read, 0.9, TAIL_FACTOR),
        ("fed, median", fed, 0.5, FED_FACTOR),
    ]
    problems = []
    for kind in seen:
        for part in range(len(layers.engine)):
            for what, tokens, quantile, factor in judged:
                value, allowed = (
                    np.quantile(errors[kind][part, tokens], quantile) for errors in (seen, noise)
                )
                line = f"part {part}, {kind}, {what}: {value:.5f}, rounded oracle: {allowed:.5f}"
                print(line)
                if value > factor * allowed:
                    problems.append(f"{line}, allowed: {factor} times that")
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_no_part_has_a_fault_and_each_would_be_seen(layers, fault):
    """A fault's share in the engine's difference is 0 where it is absent, and 1 where the engine
    has it; below one half the engine is nearer to the right result than to the faulty one.

    The difference is the one from the rounded oracle: some roundings, such as that of the only
    entry of C128A, are the same in every right implementation.
    """
    kind = "mixing" if fault == "sinkhorn_3" else "output"
    change = layers.split(layers.results[fault] - layers.results["exact"])[kind]
    squares = np.square(change).sum(-1)
    changed = np.flatnonzero(np.sqrt(squares).max(-1) > 1e-3)
    assert tuple(changed) == layers.case.faults[fault]
    seen = layers.split(layers.engine - layers.results["rounded"])[kind]
    for part in changed:
        share = (seen[part] * change[part]).sum() / squares[part].sum()
        noise = np.square(seen[part]).mean(-1)
        error = np.sqrt((noise * squares[part]).sum()) / squares[part].sum()
        line = f"part {part}: share {share:.4f}, standard error {error:.4f}"
        print(line)
        assert abs(share) < LARGEST_SHARE and error < LARGEST_ERROR, line
