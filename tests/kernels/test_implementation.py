"""Which form of an operation runs: asked for, or by the device and ``SM12X_KERNELS``."""

from __future__ import annotations

import pytest

from vllm_sm12x import implementation
from vllm_sm12x.dispatch import OPERATIONS


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(implementation.ENV, raising=False)
    implementation.clear_cache()
    yield
    implementation.clear_cache()


@pytest.mark.parametrize("operation", implementation.OPERATIONS)
def test_by_default_a_kernel_runs_where_it_was_shown_right(monkeypatch, operation):
    monkeypatch.setattr(implementation, "SHOWN", frozenset({"sparse_mla_prefill"}))
    expected = "triton" if operation == "sparse_mla_prefill" else "reference"
    assert implementation.choose(operation, None, on_gpu=True) == expected


@pytest.mark.parametrize("value", ["auto", "all"])
@pytest.mark.parametrize("operation", implementation.OPERATIONS)
def test_the_reference_on_a_cpu(monkeypatch, operation, value):
    monkeypatch.setenv(implementation.ENV, value)
    assert implementation.choose(operation, None, on_gpu=False) == "reference"


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("asked", ["reference", "triton"])
def test_what_is_asked_for_is_taken(monkeypatch, asked, on_gpu):
    monkeypatch.setenv(implementation.ENV, "all")
    assert implementation.choose("sparse_mla_decode", asked, on_gpu) == asked


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", set(implementation.SHOWN)),
        ("auto", set(implementation.SHOWN)),
        ("none", set()),
        ("all", set(implementation.OPERATIONS)),
        (" sparse_mla_prefill ,sparse_mla_decode", {"sparse_mla_prefill", "sparse_mla_decode"}),
    ],
)
def test_the_setting(monkeypatch, value, expected):
    monkeypatch.setenv(implementation.ENV, value)
    assert implementation.kernel_operations() == expected
    for operation in implementation.OPERATIONS:
        form = "triton" if operation in expected else "reference"
        assert implementation.choose(operation, None, on_gpu=True) == form


@pytest.mark.parametrize("value", ["attention", "all,sparse_mla_decode", "sparse_mla_decode,"])
def test_an_unknown_operation_is_refused(value):
    with pytest.raises(ValueError, match="SM12X_KERNELS=.*is not allowed; allowed: auto"):
        implementation.parse_setting(value)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="implementation: 'cuda', allowed: reference, triton"):
        implementation.choose("sparse_mla_decode", "cuda", on_gpu=True)


def test_every_operation_with_a_kernel_is_one_of_the_portable_path():
    assert implementation.SHOWN <= set(implementation.OPERATIONS) <= set(OPERATIONS)
