"""The tests that the series adds to upstream's are found, and each must run and pass."""

from __future__ import annotations

import pytest

from tests.rings.outcomes import FAILED, PASSED, SKIPPED, Outcome
from tests.upstream import added

# Named by vllm-project/vllm#41834, with the command that runs them.
REGRESSION_TESTS = [
    "tests/v1/worker/test_gpu_model_runner.py"
    "::test_deepseek_v4_mtp_dummy_sampler_warmup_caps_large_max_num_seqs",
    "tests/v1/worker/test_gpu_model_runner.py"
    "::test_dummy_sampler_warmup_does_not_cap_other_mtp_models",
    "tests/model_executor/test_deepseek_v4_kernel_warmup.py"
    "::test_deepseek_v4_mtp_uniform_decode_warmup_caps_large_max_num_seqs",
    "tests/v1/cudagraph/test_cudagraph_dispatch.py"
    "::TestCudagraphDispatcher::test_deepseek_v4_mtp_spec_decode_skips_full_decode_graphs",
]


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patched") / "added"
    return folder, added.lay_out(folder)


def test_the_four_regression_tests_are_among_them(laid_out):
    assert set(REGRESSION_TESTS) <= set(laid_out[1])


def test_no_test_of_the_release_counts_as_added(laid_out):
    _, nodes = laid_out
    files = {node.split("::")[0] for node in nodes}
    assert "tests/v1/cudagraph/test_cudagraph_dispatch.py" in files
    assert not [node for node in nodes if node.endswith("::test_dispatcher")]
    assert len(nodes) == len(set(nodes))


def test_the_wheel_is_not_hidden_and_the_package_of_tests_is_whole(laid_out):
    folder, _ = laid_out
    assert not (folder / "vllm").exists()
    assert (folder / "tests" / "conftest.py").is_file()
    assert (folder / "pyproject.toml").is_file()


def test_tests_are_found_in_files_and_in_classes():
    source = (
        "import x\ndef helper(): pass\ndef test_a(): pass\nasync def test_b(): pass\n"
        "class TestC:\n    def test_d(self): pass\n    def other(self): pass\n"
    )
    assert added._tests(source) == ["test_a", "test_b", "TestC::test_d"]
    assert added._tests("") == []


@pytest.mark.parametrize(
    ("outcomes", "lines"),
    [
        ({"f::a": Outcome(PASSED), "f::b[1]": Outcome(PASSED)}, []),
        ({"f::a": Outcome(PASSED)}, ["f::b: missing"]),
        ({"f::a": Outcome(PASSED), "f::bc": Outcome(PASSED)}, ["f::b: missing"]),
        (
            {"f::a": Outcome(SKIPPED, "no GPU"), "f::b": Outcome(FAILED, "1 == 2")},
            ["f::a: skipped (no GPU)", "f::b: failed (1 == 2)"],
        ),
        (
            {"f::a": Outcome(PASSED), "f::b[1]": Outcome(PASSED), "f::b[2]": Outcome(FAILED, "x")},
            ["f::b[2]: failed (x)"],
        ),
        ({"f": Outcome(FAILED, "x")}, ["f::a: missing", "f::b: missing", "f: failed (x)"]),
    ],
)
def test_each_must_have_run_and_passed(outcomes, lines):
    assert added.judge(["f::a", "f::b"], outcomes) == lines
