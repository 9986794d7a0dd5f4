"""Operations of the emulated engine: right, and row by row the same in every batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.emulated import rowwise

DTYPES = (torch.float32, torch.bfloat16)
ROWS = (1, 2, 9, 12, 31)
# In NumPy.
FUNCTIONS = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    # Above 20 PyTorch's is x itself: what it leaves out float32 does not hold.
    "softplus": lambda x: np.log1p(np.exp(x)),
}


@pytest.fixture(autouse=True)
def _same_numbers_each_time():
    torch.manual_seed(0)


def operands(dtype, rows, inner, columns):
    return (torch.randn(rows, inner) * 8).to(dtype), torch.randn(inner, columns).to(dtype)


def exact(a, b):
    return a.double().numpy() @ b.double().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [1, 37, 4096])
def test_a_product_is_the_exact_one_rounded(dtype, inner):
    a, b = operands(dtype, 7, inner, 33)
    expected = torch.from_numpy(exact(a, b)).to(dtype)
    for found in (rowwise.mm(a, b), rowwise.bmm(a[None], b[None])[0]):
        assert found.dtype == dtype
        assert torch.equal(found, expected)
    assert torch.equal(rowwise.mv(a, b[:, 3]), expected[:, 3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_is_rounded_with_the_product(dtype):
    a, b = operands(dtype, 5, 256, 33)
    bias = torch.randn(33).to(dtype)
    expected = torch.from_numpy(2 * exact(a, b) - 3 * bias.double().numpy()).to(dtype)
    assert torch.equal(rowwise.addmm(bias, a, b, beta=-3, alpha=2), expected)
    nothing = rowwise.addmm(torch.full((33,), np.nan, dtype=dtype), a, b, beta=0)
    assert torch.equal(nothing, rowwise.mm(a, b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_see_the_others(dtype):
    a, b = operands(dtype, 40, 1024, 96)
    bias = torch.randn(96).to(dtype)
    whole, with_bias = rowwise.mm(a, b), rowwise.addmm(bias, a, b)
    for rows in ROWS:
        assert torch.equal(rowwise.mm(a[:rows], b), whole[:rows])
        assert torch.equal(rowwise.addmm(bias, a[:rows], b), with_bias[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_rounded_once_and_does_not_see_the_others(dtype, name):
    """Widths that fill no vector register, as the router's and the streams' do."""
    function, numpys = getattr(rowwise, name), FUNCTIONS[name]
    for width in (1, 4, 8, 33):
        x = (torch.randn(40, width) * 8).to(dtype)
        whole = function(x)
        assert whole.dtype == dtype
        assert torch.equal(whole, torch.from_numpy(numpys(x.double().numpy())).to(dtype))
        for rows in ROWS:
            assert torch.equal(function(x[:rows].clone()), whole[:rows])


def test_they_are_what_pytorch_calls():
    """In a process of its own: there is no way back."""
    program = """
import torch
from tests.engine.emulated import rowwise
torch.manual_seed(0)
a, b, bias = torch.randn(40, 1024), torch.randn(1024, 96), torch.randn(96)
rowwise.install()
rowwise.install()
assert torch.equal(a @ b, (a.double() @ b.double()).float())
assert torch.equal(torch.einsum("mk,kn->mn", a, b), rowwise.mm(a, b))
assert torch.equal(torch.nn.functional.linear(a, b.t(), bias), rowwise.addmm(bias, a, b))
assert torch.equal(a @ b[:, 0], rowwise.mv(a, b[:, 0]))
assert torch.equal(a.bfloat16() @ b.bfloat16(), rowwise.mm(a.bfloat16(), b.bfloat16()))
for function in (torch.sigmoid, torch.nn.functional.silu, torch.nn.functional.softplus):
    x = torch.randn(999, 4)
    assert torch.equal(function(x), function(x.double()).float())
assert torch.equal(torch.nn.functional.softplus(x, 2, 1), rowwise.softplus(x, 2, 1))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
