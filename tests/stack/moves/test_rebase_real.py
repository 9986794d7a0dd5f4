"""The real rebase: the series carried to a later release again, without hands, all laws held."""

from __future__ import annotations

from pathlib import Path

import pytest

from stack import carried, rebase_save, rebasing
from stack.checking import check
from stack.git import git


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the report, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != carried.REPORT
    }


@pytest.mark.network
@pytest.mark.slow
def test_the_rebase_onto_0_23_0_runs_without_hands_and_gives_what_is_kept(tmp_path: Path):
    kept = carried.open_carried("0.23.0")
    work = tmp_path / "rebase"
    stop = rebasing.start(work, "0.23.0", recorded=kept.folder / carried.RESOLUTIONS)
    assert stop is None, f"{stop.patch} stopped: rebase --onto 0.23.0, settle it, --save"
    saved = rebase_save.save(work, tmp_path / "carried")
    assert files(saved.folder) == files(kept.folder)
    # The conflicts are real: upstream rewrote the attention module.
    replayed = [patch for patch, word in saved.statuses.items() if word == "resolution replayed"]
    touched = {
        path
        for patch in rebasing.load_state(work).patches
        if patch[0] in replayed
        for path in git("diff", "--name-only", f"{patch[1]}^", patch[1], cwd=work).lines
    }
    assert "vllm/models/deepseek_v4/attention.py" in touched
    laws = check(kept)
    assert [line for law in laws for line in law.violations] == []
    assert [law.name for law in laws if law.skipped] == []
