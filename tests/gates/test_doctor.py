"""What the doctor makes of machines that are not at hand: facts made up, findings by hand."""

from __future__ import annotations

import json
import sys
import time

import psutil
import pytest

from gates.__main__ import main
from gates.commands.doctor import matching
from gates.doctor import examination
from gates.doctor import facts as gathering
from gates.doctor.advice import advise, cache_bytes_a_token, recommended
from gates.doctor.facts import Facts
from gates.spec import load_profiles

GB = 10**9


def gpu(name="NVIDIA RTX PRO 6000 Blackwell Workstation Edition", capability="12.0", **more):
    return {
        "name": name,
        "capability": capability,
        "memory_bytes": 96 * GB,
        "free_bytes": 95 * GB,
    } | more


def pair(**changes):
    """Two RTX PRO 6000 with nothing against them."""
    made = {
        "gpus": [gpu(), gpu()],
        "driver": "580.95",
        "cuda_driver": 13000,
        "nvcc": "13.0",
        "nccl": "2.30.4",
        "peers": [[True, True], [True, True]],
        "sampler": {"works": True, "seconds": 3.0, "said": ""},
    }
    return Facts(**made | changes)


def found(facts, profile="2x-rtx-pro-6000", context=131072, utilization=0.9, **more):
    chosen = load_profiles()[profile] if profile else None
    return advise(facts, chosen, context, utilization, **more)


def levels(findings):
    return {one.level for one in findings}


def said(findings, level):
    return " / ".join(
        f"{one.what}: {one.why} -> {one.do}" for one in findings if one.level == level
    )


def test_a_good_pair_has_nothing_against_it():
    assert levels(found(pair())) == {"fine"}


def test_the_cache_that_memory_allows():
    # By hand: 21 layers keep (585 + 135) bytes every 4 tokens, 20 keep 585 every 128.
    assert cache_bytes_a_token() == pytest.approx(21 * 720 / 4 + 20 * 585 / 128)
    text = said(found(pair()), "fine")
    # 96 GB * 0.9 - 74.5 GB of weights = 11.9 GB.
    tokens = int(11.9e9 / cache_bytes_a_token())
    assert f"{tokens:,} tokens" in text and f"at most {tokens // 131072} of them" in text


def test_weights_that_do_not_fit_stop_a_run():
    text = said(found(pair(gpus=[gpu()], peers=[]), profile=None), "stop")
    assert "149.0 GB of weights a GPU" in text and "do not fit into 86.4 GB" in text
    small = pair(gpus=[gpu(memory_bytes=32 * GB, free_bytes=32 * GB)] * 4)
    assert "do not fit" in said(found(small, "4x-rtx-5090"), "stop")
    assert "do not fit" not in said(found(small, "4x-rtx-5090", weights_gb=80.0), "stop")


def test_a_context_that_does_not_fit_stops_a_run():
    text = said(found(pair(), context=10_000_000), "stop")
    assert "--max-model-len" in text and "or less" in text


def test_memory_in_use_is_said():
    text = said(found(pair(gpus=[gpu(), gpu(free_bytes=60 * GB)])), "warn")
    assert "36.0 GB of a GPU are in use" in text


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"gpus": []}, "stop", "no GPU"),
        ({"cuda_driver": 12080, "driver": "570.1"}, "stop", "CUDA 12.8"),
        ({"nccl": "2.28.9"}, "warn", "2.30.4"),
        ({"peers": [[True, False], [False, True]]}, "warn", "--disable-custom-all-reduce"),
        (
            {"sampler": {"works": False, "seconds": 1.0, "said": "no nvcc"}},
            "warn",
            "VLLM_USE_FLASHINFER_SAMPLER=0",
        ),
        ({"sampler": None, "nvcc": None}, "warn", "no nvcc on the path"),
        ({"gpus": [gpu(), gpu("NVIDIA H200", "9.0")]}, "warn", "unlike GPUs"),
        ({"gpus": [gpu("NVIDIA H200", "9.0")] * 2}, "warn", "SM12X_PORTABLE=all"),
        ({"gpus": [gpu()] * 3, "peers": []}, "warn", "the profile 2x-rtx-pro-6000 means 2"),
    ],
)
def test_each_thing_that_matters_is_found(changes, level, words):
    assert words in said(found(pair(**changes)), level)


def test_one_gb10_of_two_hosts_is_counted_as_two():
    machine = Facts(
        gpus=[gpu("NVIDIA GB10", "12.1", memory_bytes=128 * GB, free_bytes=127 * GB)],
        cuda_driver=13000,
        nccl="2.28.9",
    )
    findings = found(machine, "2x-gb10", utilization=0.8)
    assert "74.5 GB of weights a GPU" in said(findings, "fine")
    assert "2.30.4" in said(findings, "warn")
    assert "do not fit" in said(found(machine, "1x-gb10", utilization=0.8), "stop")


def test_memory_that_nobody_says_is_not_made_up():
    machine = pair(gpus=[gpu(memory_bytes=None, free_bytes=None)] * 2)
    assert "KV cache" not in " ".join(one.what for one in found(machine))


def test_what_stops_stands_first():
    findings = found(pair(cuda_driver=12000, nccl="2.28.9"))
    order = [one.level for one in findings]
    assert order == sorted(order, key=("stop", "warn", "fine").index)


def test_flags_come_with_reasons_and_what_was_found():
    profile = load_profiles()["2x-rtx-pro-6000"]
    findings = found(pair(sampler=None, nvcc=None, peers=[[True, False], [False, True]]))
    flags = dict(recommended(profile, findings))
    assert flags["--tensor-parallel-size 2"].startswith("the checkpoint takes about 149 GB")
    assert {"VLLM_USE_FLASHINFER_SAMPLER=0", "--disable-custom-all-reduce"} <= flags.keys()
    assert all(flags.values())


def test_the_profile_follows_from_the_gpus():
    profiles = list(load_profiles().values())
    assert matching(profiles, [gpu(), gpu()]).name == "2x-rtx-pro-6000"
    assert matching(profiles, [gpu("NVIDIA GeForce RTX 5090")] * 4).name == "4x-rtx-5090"
    assert matching(profiles, [gpu("NVIDIA GB10")]).name == "1x-gb10"
    assert matching(profiles, [gpu("NVIDIA A100")]) is None
    assert matching(profiles, []) is None


def test_a_python_that_says_nothing_is_said(tmp_path):
    assert "FileNotFoundError" in gathering.probe("/nowhere/python", False)["error"]
    silent = tmp_path / "python"
    silent.write_text(f"#!{sys.executable}\nimport sys; sys.exit('no torch here')\n")
    silent.chmod(0o755)
    assert gathering.probe(str(silent), False)["error"] == "no torch here"
    slow = tmp_path / "slow"
    slow.write_text(f"#!{sys.executable}\nimport time; time.sleep(60)\n")
    slow.chmod(0o755)
    told = gathering.probe(str(slow), False, within_s=0.5)
    assert told["error"] == "no answer within 0.5 s"


def serving(tmp_path, monkeypatch, sampler, name="python"):
    """A Python that sees a GPU; ``sampler`` is what it does when the sampler is to be tried."""
    monkeypatch.setattr(gathering, "nvml_gpus", lambda: {"gpus": [gpu()]})
    program = tmp_path / name
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, subprocess, sys, time\n"
        "told = {'gpus': [{'memory_bytes': 1, 'free_bytes': 1}], 'nccl': '2.30.4'}\n"
        f"if 'sampler' in sys.argv[1:]:\n    {sampler}\n"
        "print(json.dumps(told))\n"
    )
    program.chmod(0o755)
    return str(program)


def test_the_sampler_is_tried_where_there_is_a_gpu(tmp_path, monkeypatch):
    works = "told['sampler'] = {'works': True, 'seconds': 2.0, 'said': ''}"
    python = serving(tmp_path, monkeypatch, works)
    facts = gathering.gather(python, try_sampler=True)
    assert facts.sampler["works"] is True and facts.nccl == "2.30.4"
    facts = gathering.gather(python, try_sampler=False)
    assert facts.sampler is None and facts.sampler_untried == "left out"


def test_the_command_tries_the_sampler_unless_it_is_told_not_to(tmp_path, monkeypatch, capsys):
    works = "told['sampler'] = {'works': True, 'seconds': 2.0, 'said': ''}"
    python = serving(tmp_path, monkeypatch, works)
    main(["doctor", "--python", python])
    assert "FlashInfer's sampler works" in capsys.readouterr().out
    main(["doctor", "--python", python, "--no-try-sampler"])
    said_ = capsys.readouterr().out
    assert "not tried: left out" in said_ and "sampler works" not in said_


def ended(pid):
    """Gone, or waiting for a parent that does not ask."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_sampler_that_compiles_for_ever_is_given_up_with_its_compilers(tmp_path, monkeypatch):
    """The other facts stay."""
    mark = tmp_path / "pid"
    compiles = (
        f"child = subprocess.Popen(['sleep', '60']); open({str(mark)!r}, 'w').write(str(child.pid))"
        "; time.sleep(60)"
    )
    facts = gathering.gather(serving(tmp_path, monkeypatch, compiles), True, sampler_s=2.0)
    assert facts.sampler is None and facts.sampler_untried == "no answer within 2 s"
    assert facts.nccl == "2.30.4" and facts.probe_error == ""
    child = int(mark.read_text())
    # A signal is sent at once and met when the process runs next: on a busy machine, later.
    until = time.monotonic() + 20
    while not ended(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert ended(child)


def test_without_a_gpu_the_sampler_is_not_tried_and_that_is_said(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nprint('{{}}')\n")
    python.chmod(0o755)
    monkeypatch.setattr(gathering, "nvml_gpus", lambda: {"gpus": [gpu()]})
    facts = gathering.gather(str(python), try_sampler=True)
    assert facts.sampler_untried == "the Python that serves sees no CUDA GPU"
    assert "not tried: the Python that serves" in said(found(facts), "fine") + said(
        found(facts), "warn"
    )


def examined(monkeypatch, facts, serve=(), made_weights=False, profile="2x-rtx-pro-6000"):
    monkeypatch.setattr(examination, "gather", lambda python, try_sampler: facts)
    return examination.findings(load_profiles()[profile], serve, None, made_weights)


def test_a_run_is_told_what_stops_and_warns_and_nothing_else(monkeypatch):
    facts = pair(nccl="2.28.9")
    (line,) = examined(monkeypatch, facts, ["vllm", "serve", "m"])
    assert line.startswith("doctor: warn: NCCL 2.28.9: users report hangs")
    assert examined(monkeypatch, pair(), ["vllm", "serve", "m"]) == []


def test_memory_is_that_of_the_serve_command(monkeypatch):
    # 96 GB * 0.7 do not hold the 74.5 GB of a card.
    few = ["vllm", "serve", "m", "--gpu-memory-utilization", "0.7"]
    (line,) = examined(monkeypatch, pair(), few)
    assert line.startswith("doctor: stop: 74.5 GB of weights a GPU")
    long = ["vllm", "serve", "m", "--max-model-len=10000000"]
    assert "or less" in examined(monkeypatch, pair(), long)[0]
    assert examined(monkeypatch, pair(), long, made_weights=True) == []


def test_a_server_that_runs_already_has_its_memory_and_may_be_elsewhere(monkeypatch):
    full = pair(gpus=[gpu(free_bytes=GB)] * 2)
    assert examined(monkeypatch, full) == []
    assert examined(monkeypatch, Facts()) == []
    assert "stop: no GPU" in examined(monkeypatch, Facts(), ["vllm"])[0]


def test_the_doctor_looks_at_this_machine(capsys, monkeypatch):
    monkeypatch.setattr(gathering, "nvml_gpus", lambda: {"gpus": [], "gpu_error": "no driver"})
    assert main(["doctor", "--json", "--profile", "h200"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["facts"]["memory_bytes"] > 0 and told["profile"] == "h200"
    assert told["findings"][0] == {"level": "stop", "what": "no GPU", "why": "no driver", "do": ""}
    assert {"do": "SM12X_PORTABLE=all"}.items() <= told["recommended"][0].items()
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "no profile fits" in text
    assert "not tried: the Python that serves sees no CUDA GPU" in text


@pytest.mark.parametrize("argv", [["--utilization", "1.5"], ["--context", "0"]])
def test_wrong_numbers_are_refused(argv, capsys):
    assert main(["doctor", *argv]) == 1
    assert argv[0] in capsys.readouterr().err
