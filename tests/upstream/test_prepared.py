"""Groups of test files run in processes of their own, which all begin with the same imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("prepared.py")
# It prints, and counts the processes that import it.
SLOW_IMPORT = """
print("imported")
with open("imports", "a") as file:
    file.write("x")
seen = []
"""
# Leaves something behind in its process.
MARKS = """
import sys

def test_it_begins_imported():
    assert "slow_import" in sys.modules

def test_nobody_was_here_before():
    import slow_import
    assert slow_import.seen == []
    slow_import.seen.append(__file__)
"""


def run(folder, files, imports=("slow_import",), workers=2):
    """The status of each group by its file's stem, and the program's exit status."""
    (folder / "slow_import.py").write_text(SLOW_IMPORT)
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    work = {
        "imports": imports,
        "workers": workers,
        "groups": [
            {"arguments": [f"test_{name}.py", "-p", "no:cacheprovider"], "output": f"{name}.txt"}
            for name in files
        ],
    }
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        input=json.dumps(work),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(end["seconds"] > 0 for end in ends)
    return {list(files)[end["group"]]: end["status"] for end in ends}, done.returncode


def test_what_a_group_does_no_other_sees(tmp_path):
    ended = run(tmp_path, {name: MARKS for name in "abc"})
    assert ended == ({"a": 0, "b": 0, "c": 0}, 0)
    assert (tmp_path / "imports").read_text() == "x"
    for name in "abc":
        assert "2 passed" in (tmp_path / f"{name}.txt").read_text()


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("def test_a(): assert False\n", 1),
        ("import no_such_module\n", 2),
        ("", 5),
        ("import os\ndef test_a(): os.kill(os.getpid(), 9)\n", -9),
        ("import os\ndef test_a(): os._exit(7)\n", 7),
    ],
)
def test_a_groups_end_is_told_and_the_others_go_on(tmp_path, text, status):
    ended = run(tmp_path, {"bad": text, "good": "def test_b(): pass\n"}, workers=1)
    assert ended == ({"bad": status, "good": 0}, 0)


def test_an_import_that_fails_ends_it_before_any_group(tmp_path):
    ended, status = run(tmp_path, {"a": MARKS}, imports=("no_such_module",))
    assert ended == {} and status != 0
    assert not (tmp_path / "a.txt").exists()


def test_what_is_imported_stays_out_of_the_garbage_collection(tmp_path):
    text = "import gc\ndef test_a():\n    gc.unfreeze()\n    assert gc.get_freeze_count() > 1000\n"
    assert run(tmp_path, {"a": text})[0] == {"a": 0}


def test_so_many_run_at_once(tmp_path):
    """Each waits for the others to begin."""
    text = """
import time
from pathlib import Path

def test_a():
    Path(__file__ + ".began").touch()
    end = time.monotonic() + 60
    while len(list(Path().glob("*.began"))) < 3:
        assert time.monotonic() < end
        time.sleep(0.01)
"""
    assert run(tmp_path, dict.fromkeys("abc", text), workers=3)[0] == {"a": 0, "b": 0, "c": 0}


def test_no_more_run_at_once_than_asked(tmp_path):
    text = """
import time
from pathlib import Path

def test_a():
    Path("running").touch(exist_ok=False)
    time.sleep(0.3)
    Path("running").unlink()
"""
    assert run(tmp_path, dict.fromkeys("abc", text), workers=1)[0] == {"a": 0, "b": 0, "c": 0}
