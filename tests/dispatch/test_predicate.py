"""``vllm_sm12x.dispatch``: which operations are portable, and what the override may say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_sm12x import dispatch

ROOT = Path(__file__).resolve().parents[2]
ALL = {
    "sparse_mla_decode",
    "sparse_mla_prefill",
    "mqa_logits",
    "paged_mqa_logits",
    "fp8_einsum",
    "fp8_linear",
    "mhc",
    "mxfp4_experts",
    "router_logits",
    "cutedsl",
    "window_rope",
}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("auto", None),
        ("", None),
        ("   ", None),
        (" auto ", None),
        ("all", ALL),
        (" all", ALL),
        ("none", set()),
        ("mhc", {"mhc"}),
        ("mhc,cutedsl", {"mhc", "cutedsl"}),
        (" mhc ,\tcutedsl\n", {"mhc", "cutedsl"}),
        ("mhc,mhc", {"mhc"}),
        ("fp8_linear,fp8_einsum", {"fp8_linear", "fp8_einsum"}),
        ("fp8_einsum", {"fp8_einsum"}),
    ],
)
def test_values_of_the_override(value, expected):
    forced = dispatch.parse_override(value)
    assert forced == expected
    assert forced is None or isinstance(forced, frozenset)


@pytest.mark.parametrize(
    ("value", "culprit"),
    [
        ("ALL", "'ALL'"),
        ("mhc,attention", "'attention'"),
        ("all,mhc", "'all'"),
        ("none,mhc", "'none'"),
        ("auto,mhc", "'auto'"),
        ("mhc,", "''"),
        (",", "''"),
        ("mhc;cutedsl", "'mhc;cutedsl'"),
        ("mhc cutedsl", "'mhc cutedsl'"),
        ("1", "'1'"),
        ("-mhc", "'-mhc'"),
    ],
)
def test_a_bad_value_names_itself_and_every_good_one(value, culprit):
    with pytest.raises(ValueError) as error:
        dispatch.parse_override(value)
    message = str(error.value)
    assert f"SM12X_PORTABLE={value!r}" in message
    assert f"{culprit} is not allowed" in message
    for word in ("auto", "none", "all", *ALL):
        assert word in message.partition("allowed:")[2]


def test_an_operation_without_the_one_it_requires_is_refused():
    with pytest.raises(ValueError, match="fp8_linear requires fp8_einsum"):
        dispatch.parse_override("mhc,fp8_linear")


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.operation("mhc")
def test_an_unknown_operation_is_an_error_on_every_path(case, portable, name):
    del case, portable
    assert isinstance(dispatch.portable_enabled(name), bool)
    with pytest.raises(ValueError, match="operation: 'mhcs', allowed: .*mhc"):
        dispatch.portable_enabled("mhcs")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), set()),
        ((9, 0), set()),
        ((10, 0), set()),
        ((10, 3), set()),
        ((11, 0), set()),
        ((12, 0), ALL),
        ((12, 1), ALL),
        ((13, 0), set()),
    ],
)
@pytest.mark.parametrize("override", [None, "", "auto"])
def test_the_gpu_decides_unless_told(choose, capability, override, expected):
    choose(capability, override)
    assert dispatch.portable_operations() == expected
    assert {name for name in ALL if dispatch.portable_enabled(name)} == expected


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0), (12, 1)])
@pytest.mark.parametrize(
    ("override", "expected"),
    [("none", set()), ("all", ALL), ("mhc", {"mhc"}), ("cutedsl, mhc", {"cutedsl", "mhc"})],
)
def test_the_override_decides_on_every_gpu(choose, capability, override, expected):
    choose(capability, override)
    assert dispatch.portable_operations() == expected


def test_a_platform_that_is_not_cuda_has_no_portable_operation(choose, cuda, monkeypatch):
    choose((12, 0), None)
    monkeypatch.setattr(cuda, "is_cuda", lambda self: False)
    assert dispatch.portable_operations() == frozenset()


def test_the_decision_is_made_once(choose, monkeypatch):
    choose((12, 0), None)
    assert dispatch.portable_enabled("mhc")
    monkeypatch.setenv("SM12X_PORTABLE", "none")
    assert dispatch.portable_enabled("mhc")
    dispatch.clear_cache()
    assert not dispatch.portable_enabled("mhc")


def test_no_gpu_is_asked_where_the_override_decides(choose, cuda, monkeypatch):
    choose((9, 0), "all")

    def asked(*_: object) -> None:
        raise AssertionError("the platform was asked")

    monkeypatch.setattr(cuda, "get_device_capability", classmethod(asked))
    assert dispatch.portable_enabled("mhc")


def run_import(value: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import vllm_sm12x.dispatch, sys; print('vllm' in sys.modules)"],
        env={**os.environ, "SM12X_PORTABLE": value, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_bad_value_stops_the_import_with_its_text():
    result = run_import("mhc,typo")
    assert result.returncode != 0
    assert "ValueError: SM12X_PORTABLE='mhc,typo': 'typo' is not allowed" in result.stderr
    assert "cutedsl" in result.stderr


def test_a_good_value_imports_without_vllm():
    result = run_import("mhc,cutedsl")
    assert (result.returncode, result.stdout) == (0, "False\n"), result.stderr


def uses_in(text: str) -> set[str]:
    return set(re.findall(r"portable_enabled\(\s*\"([^\"]*)\"\s*\)", text))


def added_lines(patch: Path) -> str:
    # Joined, so that a call that the formatter broke over lines is seen.
    lines = patch.read_text().splitlines()
    return "\n".join(
        line[1:] for line in lines if line.startswith("+") and not line.startswith("+++")
    )


def test_patches_and_adapters_use_every_operation_and_no_other():
    listed = [
        line.strip()
        for line in (ROOT / "patches/series").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    used: set[str] = set()
    for name in listed:
        text = added_lines(ROOT / "patches" / name)
        assert len(re.findall(r"portable_enabled\(", text)) == len(
            re.findall(r"portable_enabled\(\s*\"", text)
        ), f"{name}: an operation that is not a literal"
        used |= uses_in(text)
    for adapter in (ROOT / "kernels/vllm_sm12x/adapters").glob("*.py"):
        used |= uses_in(adapter.read_text())
    assert used == ALL == set(dispatch.OPERATIONS)
    assert set(dispatch.REQUIRES.items()) == {("fp8_linear", "fp8_einsum")}


def test_every_patch_names_a_test_of_ours():
    for patch in sorted((ROOT / "patches").rglob("*.patch")):
        tests = re.findall(r"^Tests: (.+)$", patch.read_text(), re.MULTILINE)
        assert len(tests) == 1, patch.name
        # `stack check` finds the others in upstream's patched tree.
        named = tests[0].replace(",", " ").split()
        assert any((ROOT / path).is_file() for path in named), f"{patch.name}: {named}"
