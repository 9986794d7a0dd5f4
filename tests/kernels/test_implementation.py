"""Which form of an operation runs: asked for, or by the device and ``SM12X_REFERENCE``."""

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
def test_the_kernel_on_a_gpu_and_the_reference_on_a_cpu(operation):
    assert implementation.choose(operation, None, on_gpu=True) == "triton"
    assert implementation.choose(operation, None, on_gpu=False) == "reference"


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("asked", ["reference", "triton"])
def test_what_is_asked_for_is_taken(monkeypatch, asked, on_gpu):
    monkeypatch.setenv(implementation.ENV, "all")
    assert implementation.choose("sparse_mla_decode", asked, on_gpu) == asked


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", set()),
        ("none", set()),
        ("all", set(implementation.OPERATIONS)),
        (" sparse_mla_prefill ,sparse_mla_decode", {"sparse_mla_prefill", "sparse_mla_decode"}),
    ],
)
def test_the_setting(monkeypatch, value, expected):
    monkeypatch.setenv(implementation.ENV, value)
    assert implementation.reference_operations() == expected
    for operation in implementation.OPERATIONS:
        form = "reference" if operation in expected else "triton"
        assert implementation.choose(operation, None, on_gpu=True) == form


@pytest.mark.parametrize("value", ["attention", "all,sparse_mla_decode", "sparse_mla_decode,"])
def test_an_unknown_operation_is_refused(value):
    with pytest.raises(ValueError, match="SM12X_REFERENCE=.*is not allowed; allowed: none"):
        implementation.parse_setting(value)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="implementation: 'cuda', allowed: reference, triton"):
        implementation.choose("sparse_mla_decode", "cuda", on_gpu=True)


def test_every_operation_with_a_kernel_is_one_of_the_portable_path():
    assert set(implementation.OPERATIONS) <= set(OPERATIONS)
