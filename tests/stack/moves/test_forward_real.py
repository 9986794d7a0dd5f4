"""``forward`` on real releases: what upstream did from 0.22.1 to 0.23.0, read off their files.

* ``vllm/v1/attention/backends/mla/indexer.py`` is the same file in both.
* ``vllm/utils/deep_gemm.py`` gained one line, ``@functools.cache`` above ``_import_deep_gemm``.
* ``.../linear/scaled_mm/triton.py`` changed one message, two lines above ``return True, None``.
* ``vllm/models/deepseek_v4/attention.py`` lost ``_select_v4_sparse_impl``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from stack.checkout import Checkout
from stack.forwarding import forward
from stack.git import git
from stack.pin import ROOT
from stack.source import base_commit
from stack.trial import Outcome
from tests.stack.moves.small_project import Project

INDEXER = "vllm/v1/attention/backends/mla/indexer.py"
DEEP_GEMM = "vllm/utils/deep_gemm.py"
TRITON = "vllm/model_executor/kernels/linear/scaled_mm/triton.py"
ATTENTION = "vllm/models/deepseek_v4/attention.py"
# In _select_v4_sparse_impl.
IMPORT_ROCM = "        from vllm.models.deepseek_v4.amd.rocm import (\n"


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.skipif(Checkout().pin.version != "0.22.1", reason="the facts above are 0.22.1's")
def test_the_four_outcomes_on_0_23_0(tmp_path: Path):
    root, commits = tmp_path / "project", tmp_path / "commits"
    for folder in (root / "stack", root / "patches", root / "vllm", commits):
        folder.mkdir(parents=True)
    shutil.copy2(ROOT / "upstream.toml", root)
    shutil.copytree(ROOT / "stack" / "shared-files", root / "stack" / "shared-files")
    project = Project(root, {}, commits, [])
    git("init", "-q", cwd=commits)
    git("reset", "-q", "--hard", base_commit(commits, project.checkout), cwd=commits)

    def edited(path: str, old: str, new: str) -> dict[str, str]:
        text = (commits / path).read_text()
        assert text.count(old) == 1
        return {path: text.replace(old, new)}

    text = (commits / INDEXER).read_text()
    wanted = {
        project.add("Same file", {INDEXER: "# first line\n" + text}): Outcome.APPLIES,
        project.add(
            "Same change",
            edited(DEEP_GEMM, "def _import_deep", "@functools.cache\ndef _import_deep"),
        ): Outcome.UPSTREAM,
        project.add(
            "Near a change",
            edited(
                TRITON,
                'devices are supported."\n        return True, None\n',
                'devices are supported."\n        return True, None\n\n        # seam\n',
            ),
        ): Outcome.THREE_WAY,
        project.add(
            "In what is gone",
            edited(ATTENTION, IMPORT_ROCM, IMPORT_ROCM.replace("(\n", "(  # seam\n")),
        ): Outcome.CONFLICT,
    }
    (result,) = forward(["0.23.0"], checkout=project.checkout)
    assert {line.patch: line.trial.outcome for line in result.lines} == wanted
    (conflict,) = result.lines[-1].trial.conflicts
    assert (conflict.path, conflict.reason) == (ATTENTION, "changed by both")
    assert result.sdist.sha256.startswith("760269db")
