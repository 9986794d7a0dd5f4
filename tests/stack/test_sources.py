"""``sources``: what is shown, and what a comparison finds."""

from __future__ import annotations

import argparse
import subprocess

import pytest

from stack import shared
from stack.commands import sources
from stack.errors import StackError


@pytest.fixture
def run(project, monkeypatch, capsys):
    """Run the command on the small project: exit status and lines."""

    def call(**options):
        monkeypatch.setattr(sources, "Checkout", lambda: project.checkout)
        arguments = {"compare": False, "write": False} | options
        status = sources.run(argparse.Namespace(**arguments))
        return status, capsys.readouterr().out.splitlines()

    return call


def test_the_sdist_alone(run, project):
    status, lines = run()
    assert status == 0
    assert lines[0].startswith("source in use: sdist vllm-1.0.0.tar.gz (sha256 ")
    assert lines[1:3] == ["shared files: 13", "files of the sdist that are left out: 7"]
    assert "    vllm/kept.log" in lines
    assert lines[-2:] == [
        "submodule: not checked out, not compared",
        "no difference: every listed file is the same in: sdist",
    ]


def test_neither_source_at_hand(run, project):
    project.upstream.archive.unlink()
    status, lines = run()
    assert status == 0 and lines[-2:] == [
        "submodule: not checked out, not compared",
        "sdist: not in the cache, not compared",
    ]


def test_both_sources(run, project):
    project.use_submodule()
    status, lines = run(compare=True)
    assert status == 0
    assert lines[0] == f"source in use: submodule vllm ({project.upstream.commit})"
    start = lines.index("files that the submodule alone has: 4")
    assert [line.strip() for line in lines[start + 1 : start + 5]] == [
        ".gitattributes: not in the sdist",
        "ci.yml: not in the sdist",
        "linked: not in the sdist",
        "vllm/kept.log: matches upstream's own .gitignore: may be tracked, may be left over from "
        "the build",
    ]
    assert lines[-1] == "no difference: every listed file is the same in: sdist, submodule"


def test_compare_demands_the_submodule(run, project):
    with pytest.raises(StackError, match="vllm is not checked out") as caught:
        run(compare=True)
    assert "git submodule update --init vllm" in caught.value.hint


def test_every_difference_is_listed(run, project):
    """Upstream's commit has a link, another mode, other contents and a file less."""
    repository = project.root / "other"
    subprocess.run(["git", "clone", "-q", project.upstream.repository, repository], check=True)
    (repository / "README.md").unlink()
    (repository / "README.md").symlink_to("setup.py")
    (repository / "tools/run.sh").chmod(0o644)
    (repository / "setup.py").write_bytes(b"import distutils\n")
    (repository / "vllm/data.bin").unlink()
    for command in (["add", "-A"], ["commit", "-q", "-m", "differ"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=repository, check=True, capture_output=True, text=True
    )
    pin = project.root / "upstream.toml"
    text = pin.read_text(encoding="utf-8").replace(project.upstream.commit, done.stdout.strip())
    pin.write_text(text, encoding="utf-8")
    (project.root / "vllm").rmdir()
    repository.rename(project.root / "vllm")

    status, lines = run(compare=True)
    assert status == 1
    different = [line for line in lines if line.startswith("DIFFERENT")]
    assert [line.split()[1].rstrip(":") for line in different] == [
        "README.md", "setup.py", "tools/run.sh", "vllm/data.bin",
    ]  # fmt: skip
    assert "the submodule has 120000" in different[0]
    assert different[3] == "DIFFERENT  vllm/data.bin: not in the submodule"
    assert lines[-1] == "4 differences from 1.0.0.txt"


def test_a_list_that_is_not_the_rules_outcome(run, project):
    path = project.checkout.shared_files
    listed = shared.load(path)
    text = path.read_text(encoding="utf-8")
    blob = listed.files["setup.py"].blob
    text = text.replace(f"100644 {blob} setup.py\n", "")
    text = "".join(line for line in text.splitlines(True) if "PKG-INFO" not in line)
    path.write_text(text, encoding="utf-8")
    status, lines = run()
    assert status == 1
    assert "DIFFERENT  setup.py: in the sdist, not listed" in lines
    assert any(line.startswith("DIFFERENT  PKG-INFO: the list gives") for line in lines)


def test_write_makes_the_list_anew(run, project):
    path = project.checkout.shared_files
    text = path.read_text(encoding="utf-8")
    path.unlink()
    status, lines = run(write=True)
    assert status == 0 and lines[0] == "written: stack/shared-files/1.0.0.txt"
    assert path.read_text(encoding="utf-8") == text
