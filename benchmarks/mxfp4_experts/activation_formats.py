"""What an expert's result loses by the format of its activations, against float64, on a CPU.

Weights are MXFP4 and exact in every row; both inputs, of the first product and of the second, are
rounded to the format. ``python -m benchmarks.mxfp4_experts.activation_formats`` prints the table of
README.md; it needs PyTorch alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

LIMIT = 10.0
E4M3_MAX, E2M1_MAX = 448.0, 6.0
# Magnitudes of e2m1, by code (OCP Microscaling formats, v1.0).
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
# Group of values of a weight with one scale.
GROUP = 32

# What vLLM 0.22.1's DEEPGEMM_MXFP4 backend makes of these experts' activations; the checkpoint asks
# for the same in its linears (e4m3, ue8m0, 128).
MODELS_OWN = "FP8, groups of 128"
# How many times the error of these is allowed. A right engine draws the same noise once more; the
# oracle, too, fails beyond twice (tests/README.md).
BUDGET = 2.0

Round = Callable[[torch.Tensor], torch.Tensor]


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """The nearest values of e4m3; those of more than 448 become 448."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).double()


def to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """The nearest values of e2m1, ties to the even code; those of more than 6 become 6."""
    magnitude = values.abs().clamp(max=E2M1_MAX)
    middle = (E2M1[1:] + E2M1[:-1]) / 2
    code = torch.bucketize(magnitude, middle)
    tie = (code < len(middle)) & (magnitude == middle[code.clamp(max=len(middle) - 1)])
    code = torch.where(tie & (code % 2 == 1), code + 1, code)
    return E2M1[code] * values.sign()


def _power_of_two(largest: torch.Tensor, limit: float) -> torch.Tensor:
    """The least power of two that brings ``largest`` to ``limit``; 1 for zeros."""
    power = torch.exp2(torch.ceil(torch.log2(largest / limit)))
    return torch.where(largest > 0, power, 1.0)


def _in_groups(values: torch.Tensor, group: int, rounded: Callable[..., torch.Tensor]):
    """``rounded(groups, largest)`` over groups along the last dimension."""
    groups = values.unflatten(-1, (-1, group))
    return rounded(groups, groups.abs().amax(-1, keepdim=True)).flatten(-2)


def bfloat16(values: torch.Tensor) -> torch.Tensor:
    """bfloat16, as our exact form takes them."""
    return values.bfloat16().double()


def fp8_rows(values: torch.Tensor) -> torch.Tensor:
    """e4m3 with a power of two for each row: our second form."""
    return fp8_groups(values, values.shape[-1])


def fp8_groups(values: torch.Tensor, group: int = 128) -> torch.Tensor:
    """e4m3 with a power of two for each group."""

    def rounded(groups: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        scale = _power_of_two(largest, E4M3_MAX)
        return to_e4m3(groups / scale) * scale

    return _in_groups(values, group, rounded)


def mxfp4(values: torch.Tensor) -> torch.Tensor:
    """e2m1 with a power of two for each 32 that no value exceeds, as vLLM quantises MXFP4."""

    def rounded(groups: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        scale = _power_of_two(largest, E2M1_MAX)
        return to_e2m1(groups / scale) * scale

    return _in_groups(values, GROUP, rounded)


def mxfp4_saturating(values: torch.Tensor) -> torch.Tensor:
    """MXFP4 as OCP's conversion makes it: the largest's exponent less 2, and values above 6 cut."""

    def rounded(groups: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        scale = torch.exp2(torch.floor(torch.log2(largest)) - 2)
        scale = torch.where(largest > 0, scale, 1.0)
        return to_e2m1(groups / scale) * scale

    return _in_groups(values, GROUP, rounded)


def nvfp4(values: torch.Tensor) -> torch.Tensor:
    """e2m1 with an e4m3 scale for each 16 and a float32 factor a row: the finest FP4 there is."""
    factor = values.abs().amax(-1, keepdim=True) / (E2M1_MAX * E4M3_MAX)
    factor = torch.where(factor > 0, factor, 1.0)

    def rounded(groups: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        scale = to_e4m3(largest / E2M1_MAX)
        # What is too small for a scale becomes zeros.
        return torch.where(scale > 0, to_e2m1(groups / scale.clamp(min=2.0**-9)) * scale, 0.0)

    return _in_groups(values / factor, 16, rounded) * factor


def mxfp4_twice(values: torch.Tensor) -> torch.Tensor:
    """The sum of two MXFP4 numbers, the second of what the first leaves: twice the products."""
    first = mxfp4(values)
    return first + mxfp4(values - first)


FORMATS: Mapping[str, Round] = {
    "bfloat16": bfloat16,
    MODELS_OWN: fp8_groups,
    "FP8, rows (ours)": fp8_rows,
    "MXFP4": mxfp4,
    "MXFP4, saturating": mxfp4_saturating,
    "NVFP4": nvfp4,
    "MXFP4, two terms": mxfp4_twice,
}


@dataclass(frozen=True)
class Expert:
    """Dequantised weights, float64: ``w13 [2 * I, H]``, gate before up, and ``w2 [H, I]``."""

    w13: torch.Tensor
    w2: torch.Tensor

    def result(self, x: torch.Tensor, rounded: Round) -> torch.Tensor:
        """``[T, H]``: both inputs rounded, everything else in float64."""
        gate, up = (rounded(x) @ self.w13.T).chunk(2, -1)
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        return rounded(gate * torch.sigmoid(gate) * up) @ self.w2.T


def even_nibbles(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Weights of ``inputs.py``: every code as likely, scales a few powers of two apart."""
    code = torch.randint(0, 16, (rows, columns), generator=generator)
    power = torch.randint(116, 122, (rows, columns // GROUP), generator=generator) - 127
    values = E2M1[code & 7] * (1 - 2 * (code >> 3))
    return (values.unflatten(-1, (-1, GROUP)) * 2.0 ** power.unsqueeze(-1)).flatten(-2)


def quantised_normal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """A trained matrix's stand-in: normal, groups of other magnitudes, quantised to MXFP4."""
    power = torch.randn(rows, columns // GROUP, 1, generator=generator, dtype=torch.float64) * 0.75
    drawn = torch.randn(rows, columns // GROUP, GROUP, generator=generator, dtype=torch.float64)
    spread = math.sqrt(math.exp(2 * (0.75 * math.log(2)) ** 2))
    return mxfp4((drawn * torch.exp2(power)).flatten(-2) / (spread * math.sqrt(columns)))


WEIGHTS = {"even nibbles": even_nibbles, "quantised normal": quantised_normal}


def normal(tokens: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Activations without a tail."""
    return torch.randn(tokens, columns, generator=generator, dtype=torch.float64)


def heavy_tailed(tokens: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """As language models have them after a norm: Student's t with 4 degrees of freedom, channels of
    other magnitudes, and one channel in 256 that is 30 times the others in every token.
    """
    squares = torch.randn(4, tokens, columns, generator=generator, dtype=torch.float64).square()
    drawn = normal(tokens, columns, generator) / squares.mean(0).sqrt()
    channel = torch.exp2(torch.randn(columns, generator=generator, dtype=torch.float64) * 0.75)
    outliers = torch.randperm(columns, generator=generator)[: max(1, columns // 256)]
    channel[outliers] *= 30.0
    drawn *= channel
    return drawn / drawn.square().mean(-1, keepdim=True).sqrt()


ACTIVATIONS = {"normal": normal, "heavy-tailed": heavy_tailed}


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Root of the mean square of the error, over that of the exact result."""
    return float((found - exact).norm() / exact.norm())


def measure(
    weights: str,
    activations: str,
    *,
    hidden: int = 4096,
    intermediate: int = 2048,
    tokens: int = 64,
    experts: int = 4,
    seed: int = 0,
) -> dict[str, float]:
    """Relative error of the experts' results, by format.

    Args:
        weights: A key of :data:`WEIGHTS`.
        activations: A key of :data:`ACTIVATIONS`.
        tokens: That every expert gets.
    """
    generator = torch.Generator().manual_seed(seed)
    make = WEIGHTS[weights]
    squares = dict.fromkeys(FORMATS, 0.0)
    size = 0.0
    for _ in range(experts):
        expert = Expert(
            make(2 * intermediate, hidden, generator), make(hidden, intermediate, generator)
        )
        # What the engine hands over is bfloat16.
        x = bfloat16(ACTIVATIONS[activations](tokens, hidden, generator))
        exact = expert.result(x, lambda values: values)
        size += float(exact.square().sum())
        for name, rounded in FORMATS.items():
            squares[name] += float((expert.result(x, rounded) - exact).square().sum())
    return {name: math.sqrt(square / size) for name, square in squares.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=64, help="of each expert (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    columns = [(weights, activations) for weights in WEIGHTS for activations in ACTIVATIONS]
    found = [measure(*c, tokens=arguments.tokens, seed=arguments.seed) for c in columns]
    print("| activations | " + " | ".join(f"{w}, {a}" for w, a in columns) + " |")
    print("|" + " --- |" * (1 + len(columns)))
    for name in FORMATS:
        cells = (
            f"{errors[name]:.2%} ({errors[name] / errors[MODELS_OWN]:.2f})" for errors in found
        )
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
