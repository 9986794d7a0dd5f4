"""The GitHub workflows: valid by GitHub's schema, safe by zizmor's audit, calling what exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stack.__main__ import COMMANDS
from stack.pin import ROOT

FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))
BIN = Path(sys.executable).parent
# What a runner image has beside the checkout's own commands.
ON_THE_RUNNER = {"bash", "gh", "python3", "sha256sum"}
SHELL_WORDS = {"if", "then", "else", "fi", "!"}


def load(path):
    """A workflow as YAML; its ``on:`` is the key ``True`` there, and is put right."""
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    text["on"] = text.pop(True)
    return text


def steps(path):
    """Every step of every job: ``(job name, step)``."""
    for name, job in load(path)["jobs"].items():
        for step in job["steps"]:
            yield name, step


def scripts():
    """Every ``run:`` script as a pytest parameter."""
    return [
        pytest.param(step["run"], id=f"{path.stem}-{job}-{number}")
        for path in WORKFLOWS
        for number, (job, step) in enumerate(steps(path))
        if "run" in step
    ]


def tool(*command):
    return subprocess.run(
        [BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )


def by_schema(path, schema="vendor.github-workflows"):
    return tool("check-jsonschema", "--builtin-schema", schema, str(path))


def test_the_four_workflows_are_here():
    assert [path.stem for path in WORKFLOWS] == ["forward", "sources", "test", "wheels"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_schema_holds(path):
    done = by_schema(path)
    assert done.returncode == 0, done.stdout


def test_the_schema_of_dependabot_holds():
    done = by_schema(ROOT / ".github" / "dependabot.yml", "vendor.dependabot")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("old", "new"),
    [("runs-on:", "run-on:"), ("timeout-minutes: 60", "timeout-minutes: soon"), ("jobs:", "job:")],
)
def test_the_schema_check_can_fail(tmp_path, old, new):
    text = (FOLDER / "test.yml").read_text(encoding="utf-8")
    assert old in text
    broken = tmp_path / "broken.yml"
    broken.write_text(text.replace(old, new))
    assert by_schema(broken).returncode != 0


def test_the_audit_finds_nothing():
    done = tool("zizmor", "--offline", "--persona", "pedantic", "--no-progress", ".github")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_audit_can_fail(tmp_path):
    text = (FOLDER / "test.yml").read_text(encoding="utf-8")
    broken = tmp_path / ".github" / "workflows" / "broken.yml"
    broken.parent.mkdir(parents=True)
    broken.write_text(text.replace("run: bash .ci/run", "run: echo ${{ github.head_ref }}"))
    done = tool("zizmor", "--offline", "--no-progress", str(tmp_path))
    assert done.returncode != 0 and "template-injection" in done.stdout


@pytest.mark.parametrize("script", scripts())
def test_every_script_parses(script):
    done = _shellcheck(script)
    assert done.returncode == 0, done.stdout


def _shellcheck(script):
    return subprocess.run(
        [BIN / "shellcheck", "--shell=bash", "-"],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )


def test_shellcheck_can_fail():
    assert _shellcheck("if true; then echo").returncode != 0
    assert _shellcheck("rm $1/*").returncode != 0


@pytest.mark.parametrize("script", scripts())
def test_no_script_interpolates_an_expression(script):
    assert "${{" not in script, "pass it through env: instead"


def commands_in(script):
    """The simple commands of a script, as lists of words."""
    joined = script.replace("\\\n", " ")
    joined = re.sub(r"\$\(([^)]*)\)", r"x; \1; ", joined)
    for line in re.split(r"\n|;|\|\||&&|(?<!\|)\|(?!\|)", joined):
        words = shlex.split(line, comments=True)
        while words and (words[0] in SHELL_WORDS or re.match(r"\w+=", words[0])):
            words = words[1:]
        if words and words[0] != "[":
            yield words


@pytest.mark.parametrize("script", scripts())
def test_what_a_script_calls_exists(script):
    for words in commands_in(script):
        if words[:2] == ["python3", "stack/bootstrap.py"] or words[0] == "./build.sh":
            command = words[2] if words[0] == "python3" else "wheel"
            assert command in COMMANDS
            shown = stack_help(command)
            for word in words:
                if word.startswith("--"):
                    assert word in shown, f"{command} has no {word}"
        elif words[:2] == ["bash", ".ci/run"]:
            continue
        else:
            assert words[0] in ON_THE_RUNNER, f"{words[0]} is not known to be on the runner"
        for word in words[:2]:
            if "/" in word and not word.startswith(("-", "/", "dist/")):
                assert (ROOT / word).is_file(), f"{word} is not in the checkout"


def stack_help(command):
    done = subprocess.run(
        [sys.executable, "-m", "stack", command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return re.findall(r"--[a-z-]+", done.stdout)


def test_commands_are_found_in_a_script():
    script = (
        'if ! gh view "$A" >/dev/null; then\n  ./build.sh --arch \\\n all || x=1\nfi\nn=$(gh list)'
    )
    found = [words[:2] for words in commands_in(script)]
    assert ["gh", "view"] in found and ["./build.sh", "--arch"] in found and ["gh", "list"] in found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_permissions_are_read_alone_but_where_written(path):
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    writing = {
        (name, key)
        for name, job in workflow["jobs"].items()
        for key, value in job.get("permissions", {}).items()
        if value == "write"
    }
    allowed = {"forward": {("forward", "issues")}, "wheels": {("release", "contents")}}
    assert writing == allowed.get(path.stem, set())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_githubs_own_and_jobs_end(path):
    workflow = load(path)
    assert "pull_request_target" not in workflow["on"]
    assert "group" in workflow["concurrency"]
    for job in workflow["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 60
    for _, step in steps(path):
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/none@v0"))
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_pushes_and_tags_make_the_wheels_of_both_architectures_with_receipts():
    workflow = load(FOLDER / "wheels.yml")
    assert workflow["on"]["push"] == {"branches": ["**"], "tags": ["v*"]}
    build = workflow["jobs"]["build"]["steps"]
    assert any(step.get("run") == "./build.sh --arch all" for step in build)
    upload = next(step for step in build if "upload-artifact" in step.get("uses", ""))
    assert upload["with"]["path"].split() == ["dist/*.whl", "dist/*.json"]
    assert upload["with"]["if-no-files-found"] == "error"
    release = workflow["jobs"]["release"]
    assert release["if"] == "github.ref_type == 'tag'" and release["needs"] == "build"


def test_ring_0_runs_on_pushes_and_pull_requests():
    workflow = load(FOLDER / "test.yml")
    assert {"push", "pull_request"} <= workflow["on"].keys()
    assert any(step.get("run") == "bash .ci/run" for _, step in steps(FOLDER / "test.yml"))
    assert "./test.sh" in (ROOT / ".ci" / "run").read_text()


def test_the_two_sources_are_compared_on_a_checked_out_submodule():
    found = [step for _, step in steps(FOLDER / "sources.yml")]
    checkout = next(step for step in found if "checkout@" in step.get("uses", ""))
    assert checkout["with"]["submodules"] is True
    assert any("sources --compare" in step.get("run", "") for step in found)


def test_forward_runs_weekly():
    cron = load(FOLDER / "forward.yml")["on"]["schedule"][0]["cron"].split()
    assert len(cron) == 5 and cron[2:4] == ["*", "*"] and cron[4] in "0123456"


def forward_issue_script():
    return next(
        step for _, step in steps(FOLDER / "forward.yml") if "issue" in step.get("name", "")
    )


@pytest.mark.parametrize("open_issue", ["", "7"])
def test_forward_keeps_one_issue(tmp_path, open_issue):
    """The script with a gh that records what it is asked: an open issue is edited, else opened."""
    log = tmp_path / "asked"
    fake = tmp_path / "gh"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >>"{log}"\n'
        f'if [ "$1 $2" = "issue list" ]; then echo "{open_issue}"; fi\n'
    )
    fake.chmod(0o755)
    (tmp_path / "forward.md").write_text("report")
    step = forward_issue_script()
    env = {key: str(value) for key, value in step["env"].items()}
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", step["run"]],
        cwd=tmp_path,
        env=env | {"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    asked = log.read_text()
    assert ("issue edit 7" in asked) is bool(open_issue)
    assert ("issue create" in asked) is not bool(open_issue)
    assert "--body-file forward.md" in asked


@pytest.mark.parametrize(("status", "fails"), [(0, False), (3, False), (1, True), (2, True)])
def test_a_conflict_is_a_report_and_an_error_is_an_error(tmp_path, status, fails):
    fake = tmp_path / "python3"
    fake.write_text(f"#!/bin/sh\nexit {status}\n")
    fake.chmod(0o755)
    script = next(
        step["run"] for _, step in steps(FOLDER / "forward.yml") if "latest" in step.get("run", "")
    )
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}
    )
    assert (done.returncode != 0) is fails
