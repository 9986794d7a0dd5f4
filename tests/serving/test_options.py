"""The served options are those that README.md tells users to take."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.serving.options import Serve, free_port, variables
from tests.serving.served import ROOT, port_is_free

# Of the machine at hand, not of the model.
OWN = ("--tensor-parallel-size", "--gpu-memory-utilization")


def options(words):
    """Flags and their values; JSON as what it says."""
    found, flag = {}, None
    for word in words:
        if word.startswith("--"):
            flag, found[word] = word, None
        elif flag is not None:
            found[flag] = json.loads(word) if word.startswith("{") else word
    return found


def test_every_option_of_the_readme_is_served_with():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^vllm serve \S+ \\\n((?:  .*\n)+)", text, re.M)
    named = options(shlex.split(command.replace("\\\n", " ")))
    served = options(Serve(Path("m"), 1).command())
    assert len(named) > 10
    for flag, value in named.items():
        assert flag in served
        if flag not in OWN:
            assert served[flag] == value, flag


def test_drafting_and_the_prefix_cache_can_be_left_out():
    served = options(Serve(Path("m"), 1, mtp=0, prefix_cache=False).command())
    assert "--speculative-config" not in served
    assert "--no-enable-prefix-caching" in served
    assert "--enable-prefix-caching" not in served


def test_over_several_gpus_a_hopper_gpu_takes_no_fusion_that_sm12x_has_not():
    flag = "--compilation-config"
    assert flag not in options(Serve(Path("m"), 1).command())
    served = options(Serve(Path("m"), 1, tp=2).command())
    assert served[flag] == {"pass_config": {"fuse_allreduce_rms": False}}


def test_a_path_has_its_variables():
    portable = variables("portable", "all", "sm120")
    assert (portable["SM12X_PORTABLE"], portable["SM12X_KERNELS"]) == ("all", "all")
    assert portable["SM12X_LOWERING"] == "sm120"
    native = variables("native")
    assert native["SM12X_PORTABLE"] == "none"
    assert "SM12X_LOWERING" not in native
    for wrong in ({"path": "fast"}, {"path": "portable", "lowering": "sm90"}):
        with pytest.raises(ValueError, match="allowed: "):
            variables(**wrong)


def test_a_free_port_is_free():
    assert port_is_free(free_port())
