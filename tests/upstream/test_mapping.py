"""Every touched file of upstream has its tests named, or the search that found none."""

from __future__ import annotations

import pytest

from stack.errors import StackError
from stack.pin import ROOT
from tests.upstream import mapping, suite
from tests.upstream.__main__ import FOLDER


@pytest.fixture(scope="module")
def release():
    return suite.lay_out(FOLDER)


def _missing(touched, entries):
    return [
        f"{file} ({', '.join(patches)})" for file, patches in touched.items() if file not in entries
    ]


def test_every_touched_file_has_an_entry():
    missing = _missing(mapping.touched(ROOT / "patches"), mapping.load().entries)
    assert not missing, "add to tests/upstream/map.toml: " + "; ".join(missing)


def test_no_entry_is_left_over():
    left = mapping.load().entries.keys() - mapping.touched(ROOT / "patches").keys()
    assert not left, f"no patch touches {', '.join(sorted(left))}: take it out of map.toml"


def test_every_test_that_names_a_touched_file_is_listed(release):
    for file, entry in mapping.load().entries.items():
        missing = set(mapping.tests_naming(file, release, entry.names)) - {*entry.cpu, *entry.gpu}
        assert not missing, f'map.toml: ["{file}"] lacks {", ".join(sorted(missing))}'


def test_every_listed_file_is_in_the_release(release):
    wanted = mapping.load()
    assert [file for file in (*wanted.cpu, *wanted.gpu) if not (release / file).is_file()] == []


def test_the_release_brings_no_package_that_hides_the_wheel(release):
    assert not (release / "vllm").exists()
    assert (release / "tests" / "conftest.py").is_file()


def _series(tmp_path, **patches):
    for name, text in patches.items():
        (tmp_path / f"{name}.patch").write_text(text)
    (tmp_path / "series").write_text("# order\n" + "".join(f"{name}.patch\n" for name in patches))
    return tmp_path


_CHANGE = """\
Subject: [PATCH] x

diff --git a/vllm/a.py b/vllm/a.py
index 1111111..2222222 100644
--- a/vllm/a.py
+++ b/vllm/a.py
@@ -1 +1 @@
-x
+y
diff --git a/vllm/new.py b/vllm/new.py
new file mode 100644
index 0000000..2222222
--- /dev/null
+++ b/vllm/new.py
@@ -0,0 +1 @@
+y
"""


def test_touched_lists_changed_files_and_not_added_ones(tmp_path):
    patches = _series(tmp_path, one=_CHANGE, two=_CHANGE)
    assert mapping.touched(patches) == {"vllm/a.py": ["one.patch", "two.patch"]}


def test_upstreams_own_tests_are_not_touched_files(tmp_path):
    text = _CHANGE.replace("vllm/a.py", "tests/a.py")
    assert mapping.touched(_series(tmp_path, one=text)) == {}


def test_a_deleted_file_is_touched(tmp_path):
    text = "diff --git a/vllm/gone.py b/vllm/gone.py\ndeleted file mode 100644\n"
    assert mapping.touched(_series(tmp_path, one=text)) == {"vllm/gone.py": ["one.patch"]}


def test_a_touched_file_without_an_entry_is_named_with_its_patch(tmp_path):
    touched = mapping.touched(_series(tmp_path, one=_CHANGE))
    assert _missing(touched, {}) == ["vllm/a.py (one.patch)"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from vllm.utils.deep_gemm import is_on", True),
        ("import vllm.utils.deep_gemm as d", True),
        ("from vllm.utils import deep_gemm", True),
        ("from vllm.utils import (\n    other,\n    deep_gemm,\n)", True),
        ('patch("vllm.utils.deep_gemm.has")', True),
        ("from vllm.utils import deep_gemm_other", False),
        ("from vllm.utils.deep_gemm_other import x", False),
        ("from vllm.utils import other\ndeep_gemm = 1", False),
    ],
)
def test_the_search_finds_a_module_however_it_is_imported(tmp_path, line, found):
    test = tmp_path / "tests" / "v1" / "test_it.py"
    test.parent.mkdir(parents=True)
    test.write_text(line + "\n")
    (tmp_path / "tests" / "helper.py").write_text("import vllm.utils.deep_gemm\n")
    expected = ["tests/v1/test_it.py"] if found else []
    assert mapping.tests_naming("vllm/utils/deep_gemm.py", tmp_path) == expected


def test_names_narrow_the_search(tmp_path):
    (tmp_path / "tests").mkdir()
    for name, use in (("one", "envs.compile_factors()"), ("two", "envs.compile_factors_of()")):
        (tmp_path / "tests" / f"test_{name}.py").write_text(f"import vllm.envs as envs\n{use}\n")
    found = mapping.tests_naming("vllm/envs.py", tmp_path, ["compile_factors"])
    assert found == ["tests/test_one.py"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["vllm/a.py"]\ncpu = []', "must have cpu tests, or else no-cpu-test"),
        ('["vllm/a.py"]\ncpu = ["t"]\nno-cpu-test = "x"', "must have cpu tests, or else"),
        ('["vllm/a.py"]\ncpus = ["t"]', "has cpus"),
        ('["vllm/a.py"]\ncpu = "t"', "expected a list of paths"),
        ("[", "not valid TOML"),
    ],
)
def test_a_bad_map_is_a_clear_error(tmp_path, text, message):
    path = tmp_path / "map.toml"
    path.write_text(text)
    with pytest.raises(StackError, match=message):
        mapping.load(path)
