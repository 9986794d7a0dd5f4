"""The key of vLLM's compile cache: ours when a path of ours is on, upstream's otherwise."""

from __future__ import annotations

import pytest


def hash_of(factors: dict[str, object]) -> str:
    from vllm.config.utils import hash_factors

    return hash_factors(factors)


@pytest.mark.operation("mhc")
def test_only_upstreams_factors_without_a_portable_operation(cuda, case, choose):
    from vllm import envs

    choose(case.capability, case.override)
    factors = envs.compile_factors()
    ours = {
        name
        for name in factors
        if name not in envs.environment_variables and not name.startswith("RAY_EXPERIMENTAL_NOSET_")
    }
    # Naming all the other operations is a portable path too.
    anything_portable = case.portable or "," in (case.override or "")
    assert ours == ({"SM12X_PORTABLE"} if anything_portable else set())


def test_values_and_hashes_tell_the_overrides_apart(choose):
    from vllm import envs

    seen = {}
    for capability, override in (
        ((9, 0), "none"),
        ((9, 0), "mhc"),
        ((9, 0), "mhc,cutedsl"),
        ((9, 0), "all"),
    ):
        choose(capability, override)
        seen[override] = envs.compile_factors()
    assert list(seen["mhc"]["SM12X_PORTABLE"]) == ["mhc"]
    assert list(seen["mhc,cutedsl"]["SM12X_PORTABLE"]) == ["cutedsl", "mhc"]
    assert len({hash_of(factors) for factors in seen.values()}) == 4
    # Beyond the one key nothing differs.
    for factors in seen.values():
        factors.pop("SM12X_PORTABLE", None)
    assert len({hash_of(factors) for factors in seen.values()}) == 1


def test_the_same_choice_has_the_same_key_however_it_was_made(choose):
    from vllm import envs

    def hashed(capability, override):
        choose(capability, override)
        return hash_of(envs.compile_factors())

    everything = hashed((12, 0), None)
    assert everything == hashed((12, 1), "all") == hashed((9, 0), "all")
    some = hashed((9, 0), "mhc,cutedsl")
    assert some == hashed((9, 0), " cutedsl , mhc ")
    nothing = hashed((9, 0), None)
    assert nothing == hashed((10, 0), "auto") == hashed((12, 0), "none")
    assert len({everything, some, nothing}) == 3
