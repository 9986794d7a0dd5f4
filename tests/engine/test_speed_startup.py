"""Where the time of a start goes, by a log that is written here line by line."""

import json
from unittest.mock import Mock, patch

import pytest

from benchmarks.engine import startup
from benchmarks.engine.startup import READY, Stage

SPAWNED = 1_800_000_000.0
WORDS = [
    (12.0, "APIServer", "non-default args: {'model_tag': 'm'}"),
    (13.5, "APIServer", "Resolved architecture: DeepseekV4ForCausalLM"),
    (14.0, "APIServer", "Resolved architecture: DeepSeekV4MTPModel"),
    (20.0, "EngineCore", "Initializing a V1 LLM engine (v0.22.1) with config: x"),
    (24.0, "EngineCore", "Starting to load model m..."),
    (30.0, "EngineCore", "Model loading took 26.1 GiB memory and 5.900000 seconds"),
    (31.0, "EngineCore", "Dynamo bytecode transform time: 7.25 s"),
    (39.0, "EngineCore", "torch.compile took 8.60 s in total"),
    (41.0, "EngineCore", "torch.compile took 2.50 s in total"),
    (45.0, "EngineCore", "Available KV cache memory: 80.0 GiB"),
    (45.5, "EngineCore", "GPU KV cache size: 4,263,077 tokens"),
    (60.0, "EngineCore", "Graph capturing finished in 9 secs, took 0.50 GiB"),
    (62.0, "EngineCore", "init engine (profile, create kv cache, warmup model) took 32.00 s"),
]
READY_AT = SPAWNED + 63.5


def line(after, process, words):
    return f"({process} pid=7) {SPAWNED + after:.3f} INFO 01-15 08:00:00 [core.py:1] {words}"


def log(words=WORDS):
    return "\n".join(line(*one) for one in words) + "\n"


def test_stages_end_at_their_lines_and_add_up():
    found = startup.stages(log(), SPAWNED, READY_AT)
    assert [(one.stage, one.s) for one in found] == [
        ("server: imports, arguments", 12.0),
        ("server: the model's classes", 2.0),
        ("configuration; engine: process, imports", 6.0),
        ("workers: processes, device, layers", 4.0),
        ("weights", 6.0),
        ("torch.compile", 11.0),
        ("first run, memory", 4.0),
        ("KV cache", 0.5),
        ("warm-up, CUDA graphs", 14.5),
        ("sampler, the rest of the engine", 2.0),
        (READY, 1.5),
    ]
    assert sum(one.s for one in found) == pytest.approx(63.5)


def test_a_line_that_is_missing_leaves_its_time_to_the_next_stage():
    eager = [one for one in WORDS if "torch.compile" not in one[2]]
    found = {one.stage: one.s for one in startup.stages(log(eager), SPAWNED, READY_AT)}
    assert "torch.compile" not in found
    assert found["first run, memory"] == 15.0
    assert sum(found.values()) == pytest.approx(63.5)


def test_lines_of_another_start_and_lines_without_a_stamp_are_passed_over():
    old = line(-100.0, "EngineCore", "Starting to load model m...")
    late = line(100.0, "EngineCore", "Starting to load model m...")
    bare = "(EngineCore pid=7) Starting to load model m..."
    assert startup.stages(f"{old}\n{bare}\n{late}\n", SPAWNED, READY_AT) == [Stage(READY, 63.5)]


def test_compilations_count_in_the_stage_that_they_ended_in():
    compiled = [{"at": SPAWNED + at, "kernel": "k", "s": 1.5} for at in (26.0, 29.0, 50.0, 99.0)]
    found = {one.stage: one for one in startup.stages(log(), SPAWNED, READY_AT, compiled)}
    assert (found["weights"].compiled, found["weights"].compiling_s) == (2, 3.0)
    assert found["warm-up, CUDA graphs"].compiled == 1
    assert sum(one.compiled for one in found.values()) == 3


def test_the_logs_own_figures_are_the_last_ones():
    assert startup.details(log()) == {
        "torch_compile_s": 2.5,
        "dynamo_s": 7.25,
        "graphs_s": 9.0,
        "init_engine_s": 32.0,
        "kv_cache_tokens": 4_263_077.0,
    }
    assert startup.details("") == {}


def test_kernels_that_are_compiled_beside_the_start_are_counted():
    pytest.importorskip("vllm")
    from vllm_sm12x.adapters import compile_ahead

    said = Mock()
    order = Mock(is_compiled=Mock(return_value=False))
    with (
        patch.object(compile_ahead, "logger", said),
        patch.object(compile_ahead.subprocess, "Popen", lambda *_, **__: Mock(returncode=0)),
        patch.object(compile_ahead.compile_orders, "write"),
        patch.object(compile_ahead.compile_orders, "results", lambda folder: [("k", "")] * 47),
    ):
        compile_ahead.Ahead([order] * 48).finish()
    (call,) = said.info.call_args_list
    assert startup.details(call.args[0] % call.args[1:]) == {"compiled_ahead": 47.0}


def test_a_torn_line_of_the_compile_log_is_left_out(tmp_path):
    path = tmp_path / "compiled.jsonl"
    assert startup.compilations(path) == []
    path.write_text(json.dumps({"at": 1, "kernel": "a", "s": 0.5}) + '\n{"at": 2, "ker')
    assert startup.compilations(path) == [{"at": 1.0, "kernel": "a", "s": 0.5}]


def test_a_folder_is_cold_until_a_file_is_in_it(tmp_path):
    caches = tmp_path / "caches"
    assert startup.is_cold(caches)
    made = startup.make(caches)
    assert startup.is_cold(caches)
    assert startup.contents(caches)["triton"] == {"files": 0, "bytes": 0, "kernels": 0}
    kernel = caches / "triton" / "abc" / "k.cubin"
    kernel.parent.mkdir()
    kernel.write_bytes(b"1234")
    (kernel.parent / "k.json").write_bytes(b"{}")
    assert not startup.is_cold(caches)
    assert startup.contents(caches)["triton"] == {"files": 2, "bytes": 6, "kernels": 1}
    assert startup.contents(caches)["vllm"] == {"files": 0, "bytes": 0}
    assert made["TRITON_CACHE_DIR"] == str(caches / "triton")


def test_every_cache_lies_in_the_folder(tmp_path):
    assert all(
        value.startswith(f"{tmp_path}/") for value in startup.variables_of(tmp_path).values()
    )


def test_triton_reports_what_it_compiles(tmp_path, monkeypatch):
    """The plugin itself, with the compiler's own listener and a kernel for SM120."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks.engine.server_plugin import engine_plugin
    from tests.engine import tiny_kernel

    path = tmp_path / "compiled.jsonl"
    monkeypatch.setenv(engine_plugin.COMPILE_LOG, str(path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    engine_plugin.compile_log()
    source = ASTSource(tiny_kernel.add_one, signature={"at": "*fp32"}, constexprs={})
    for _ in range(2):  # the second comes from the cache
        triton.compile(source, target=GPUTarget("cuda", 120, 32))
    (one,) = startup.compilations(path)
    assert one["kernel"] == "add_one"
    assert 0 < one["s"] < 60
