"""The registry knows DeepSeek V4's classes without a process for each, on the portable path."""

from __future__ import annotations

from pathlib import Path

import pytest

ARCHITECTURES = ("DeepseekV4ForCausalLM", "DeepSeekV4MTPModel")


class Looked(Exception):
    """The registry wanted a process to look at a class."""


@pytest.fixture
def registry(cuda: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """vLLM's registry, with an empty cache, that starts no process."""
    from vllm.model_executor.models import registry

    def look(_):
        raise Looked

    monkeypatch.setattr(registry, "_run_in_subprocess", look)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    return registry


@pytest.mark.parametrize("override", [None, "all", "none", "mhc"])
@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0), (12, 1)], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_known_is_what_the_registry_would_see(
    registry, choose, architecture, capability, override
):
    choose(capability, override)
    portable = override in ("all", "mhc") or (override is None and capability >= (12, 0))
    model = registry.ModelRegistry.models[architecture]
    if not portable:
        with pytest.raises(Looked):
            model.inspect_model_cls()
        return
    seen = registry._ModelInfo.from_model_cls(model.load_model_cls())
    assert model.inspect_model_cls() == seen


def test_a_cache_that_has_the_class_is_read(registry, choose, monkeypatch):
    """What upstream wrote there comes first."""
    choose((12, 0), None)
    model = registry.ModelRegistry.models[ARCHITECTURES[0]]
    cached = object()
    monkeypatch.setattr(type(model), "_load_modelinfo_from_cache", lambda *_: cached)
    assert model.inspect_model_cls() is cached


def test_another_module_is_looked_at(registry, choose, monkeypatch):
    from vllm_sm12x.adapters import model_info

    choose((12, 0), None)
    monkeypatch.setattr(model_info, "MODULE_HASH", "another")
    with pytest.raises(Looked):
        registry.ModelRegistry.models[ARCHITECTURES[0]].inspect_model_cls()


def test_other_models_are_looked_at(registry, choose):
    choose((12, 0), None)
    with pytest.raises(Looked):
        registry.ModelRegistry.models["DeepseekV3ForCausalLM"].inspect_model_cls()
