"""What no tracked file may hold, and what every one of a kind must."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from stack.git import git
from stack.pin import ROOT, load_pin

BIN = Path(sys.executable).parent
# Written so that this file does not hold what it forbids.
MACHINE_PATHS = re.compile(
    r"(?<![\w.$~}-])/(?:root|work|mnt|Users)/\w|(?<![\w.$~}-])/home/(?!you\b|user\b)\w|(?<![\w$}])/tmp"
    r"/[a-z]/"
)
INDEX_HOSTS = re.compile(
    r"\b(?:[\w-]+\.)*(?:"
    + "|".join(("pypi" + r"\.org", "python" + "hosted", "pypi" + r"\.python"))
    + r")"
)
SECRETS = re.compile(r"gh[pousr]_[A-Za-z0-9]{30}|-----BEGIN [A-Z ]*PRIVATE KEY|AKIA[0-9A-Z]{16}")


@cache
def tracked():
    """Every tracked file of this repository, the submodule apart."""
    listing = git("ls-files", "-s", "-z", cwd=ROOT).fields
    return [ROOT / entry.partition("\t")[2] for entry in listing if not entry.startswith("160000")]


@cache
def texts():
    """``path -> text`` of the tracked files that are UTF-8 and still there."""
    found = {}
    for path in tracked():
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            found[path.relative_to(ROOT).as_posix()] = content.decode("utf-8", "replace")
    return found


def hits(pattern, but=()):
    return [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts().items()
        if name not in but
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_there_are_files_to_look_at():
    assert {"LICENSE", "upstream.toml", "build.sh", "test.sh", "stack/pin.py"} <= texts().keys()


def test_no_path_of_a_machine():
    assert hits(MACHINE_PATHS) == []


def test_no_host_of_a_package_index():
    assert hits(INDEX_HOSTS) == []


def test_no_secret():
    assert hits(SECRETS) == []


@pytest.mark.parametrize(
    ("pattern", "line", "found"),
    [
        (MACHINE_PATHS, "see /ro" + "ot/x", True),
        (MACHINE_PATHS, "cd /wo" + "rk/main", True),
        (MACHINE_PATHS, "cd /ho" + "me/ann/x", True),
        (MACHINE_PATHS, "$HOME/wo" + "rk/x and ~/wo" + "rk/x and a/wo" + "rk/b", False),
        (MACHINE_PATHS, "/usr/bin/env", False),
        (INDEX_HOSTS, "https://files.python" + "hosted.org/x", True),
        (INDEX_HOSTS, "https://pypi" + ".org/simple", True),
        (INDEX_HOSTS, "PyPI, pypi-simple, vnd.pypi.simple", False),
        (SECRETS, "ghp_" + "a" * 36, True),
    ],
)
def test_the_searches_find_what_they_should(pattern, line, found):
    assert bool(pattern.search(line)) is found


def test_no_file_is_large():
    large = [path.name for path in tracked() if path.is_file() and path.stat().st_size > 2 << 20]
    assert large == [], "wheels, archives and weights do not belong in the repository"


def test_text_ends_with_one_newline_and_no_line_with_spaces():
    wrong = []
    for name, text in texts().items():
        # Patches and git's own records hold upstream's lines as they are.
        if not name.startswith(("patches/", "carried/")) and text:
            if not text.endswith("\n") or text.endswith("\n\n") or "\r" in text:
                wrong.append(f"{name}: its end")
            wrong += [
                f"{name}:{number}"
                for number, line in enumerate(text.split("\n"), 1)
                if line != line.rstrip()
            ]
    assert wrong == []


def test_the_licence_is_apaches():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_gitlink_is_the_pinned_commit():
    mode, object_id, *_ = git("ls-files", "-s", "vllm", cwd=ROOT).text.split()
    assert (mode, object_id) == ("160000", load_pin().commit)


def test_gitmodules_names_upstream():
    def setting(key):
        return git("config", "-f", ".gitmodules", f"submodule.vllm.{key}", cwd=ROOT).text

    assert (setting("path"), setting("url")) == ("vllm", load_pin().repository)
    names = git("config", "-f", ".gitmodules", "--name-only", "--list", cwd=ROOT).lines
    assert {name.split(".")[1] for name in names} == {"vllm"}


def shell_scripts():
    return [name for name, text in texts().items() if re.match(r"#!.*\b(ba)?sh\b", text)]


def test_the_shell_scripts_are_known():
    assert {"build.sh", "test.sh", ".ci/run"} <= set(shell_scripts())


@pytest.mark.parametrize("name", ["build.sh", "test.sh", ".ci/run"])
def test_entry_points_are_executable(name):
    assert git("ls-files", "-s", name, cwd=ROOT).text.startswith("100755")


def test_shellcheck_finds_nothing():
    done = subprocess.run(
        [BIN / "shellcheck", *shell_scripts()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def python_files(*folders):
    return [name for name in texts() if name.endswith(".py") and name.startswith(folders)]


@pytest.mark.parametrize(
    "folder", ["gates/", "stack/", "kernels/", "tests/rings/", "tests/upstream/"]
)
def test_modules_and_public_functions_have_docstrings(folder):
    missing = []
    for name in python_files(folder):
        found = without_docstring(name, texts()[name])
        if "/test_" in name or name.endswith("/reference.py"):
            # A test's name says what it shows; an operation is documented in its __init__.py.
            found = [line for line in found if line == name]
        missing += found
    assert missing == []


def without_docstring(name, text):
    """The module, and its public functions and classes at the top level, that say nothing."""
    tree = ast.parse(text)
    found = [] if ast.get_docstring(tree) or not tree.body else [name]
    for node in tree.body:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if (
            isinstance(node, kinds)
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ):
            found.append(f"{name}:{node.lineno}: {node.name}")
    return found


def test_a_missing_docstring_is_found():
    text = '"""Said."""\ndef f(): pass\ndef _g(): pass\nclass C:\n    """Said."""\n'
    assert without_docstring("a.py", text) == ["a.py:2: f"]
    assert without_docstring("b.py", "x = 1\n") == ["b.py"]


def imports(text):
    """The top-level packages that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def test_ops_know_nothing_of_vllm():
    wrong = [
        name for name in python_files("kernels/vllm_sm12x/ops/") if "vllm" in imports(texts()[name])
    ]
    assert wrong == []


def test_ops_do_not_import_adapters():
    pattern = re.compile(r"^\s*(from|import)\s+(vllm_sm12x)?\.*adapters\b|vllm_sm12x\.adapters")
    assert [h for h in hits(pattern) if h.startswith("kernels/vllm_sm12x/ops/")] == []


def operations():
    """The folder names under ``ops/``."""
    parts = {Path(name).parts for name in python_files("kernels/vllm_sm12x/ops/")}
    return sorted({part[3] for part in parts if len(part) > 4})


def test_there_are_operations():
    assert {"sparse_mla", "mqa_logits", "fp8_einsum", "mhc", "mxfp4_experts"} <= set(operations())


@pytest.mark.parametrize("name", operations())
def test_an_operation_has_its_reference_and_a_test_named_alike(name):
    folder = f"kernels/vllm_sm12x/ops/{name}"
    for path in (
        f"{folder}/__init__.py",
        f"{folder}/reference.py",
        f"tests/kernels/test_{name}.py",
    ):
        assert path in texts(), f"{path} is missing"


def requirements(name):
    """``{package: version}`` of a locked file; a package with markers may have several."""
    pins = {}
    for line in texts()[name].splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^\s;\\]+)", line):
            pins.setdefault(match[1].lower().replace("_", "-"), set()).add(match[2])
    return pins


@pytest.mark.parametrize(
    "name",
    [
        "gates/requirements.txt",
        "stack/requirements.txt",
        "tests/requirements.txt",
        "tests/requirements-checks.txt",
        "tests/requirements-gates.txt",
    ],
)
def test_requirements_are_pinned_by_digest(name):
    entries = re.split(r"\n(?=[A-Za-z0-9])", texts()[name].partition("\n")[2].replace("\\\n", " "))
    entries = [entry for entry in entries if re.match(r"[A-Za-z0-9]", entry)]
    assert entries
    assert [e.split()[0] for e in entries if "==" not in e or "--hash=sha256:" not in e] == []


@pytest.mark.parametrize(
    ("tests", "tools"),
    [
        ("tests/requirements-checks.txt", "stack/requirements.txt"),
        ("tests/requirements-gates.txt", "gates/requirements.txt"),
    ],
)
def test_requirements_of_the_checks_agree_with_the_tools(tests, tools):
    ours, theirs = requirements(tests), requirements(tools)
    shared = ours.keys() & theirs.keys()
    assert {n: (ours[n], theirs[n]) for n in shared if ours[n] != theirs[n]} == {}


def locks():
    return [name for name in texts() if re.fullmatch(r"constraints/py3\d+-\w+\.txt", name)]


def test_requirements_of_the_tests_agree_with_every_lock():
    assert len(locks()) == 10
    ours = requirements("tests/requirements.txt")
    for lock in locks():
        theirs = requirements(lock)
        wrong = {
            n: (ours[n], theirs[n]) for n in ours.keys() & theirs.keys() if not theirs[n] <= ours[n]
        }
        assert wrong == {}, lock
