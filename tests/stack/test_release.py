"""The pinned release itself, from its sdist."""

from __future__ import annotations

import pytest

from stack import comparing, shared, source
from stack.checkout import Checkout
from stack.git import git
from stack.importing import import_series

pytestmark = pytest.mark.network


def test_the_pinned_sdist_gives_the_pinned_tree(tmp_path):
    repo = tmp_path / "repo"
    repo.mkdir()
    git("init", "-q", cwd=repo)
    checkout = Checkout()
    commit = source.release_commit(repo, checkout.pin.version, sdist=source.pinned_sdist(checkout))
    assert source.tree_of(repo, commit) == checkout.pin.base_tree


def test_the_committed_list_is_what_the_rules_give_for_the_pinned_sdist():
    checkout = Checkout()
    archive = source.pinned_sdist(checkout)
    assert comparing.compare(checkout, archive, submodule=False).differences == ()
    assert len(shared.load(checkout.shared_files).files) > 5000


def test_the_series_gives_the_pinned_tree(tmp_path):
    checkout = Checkout()
    made = import_series(tmp_path / "vllm", checkout=checkout)
    assert source.tree_of(made.path, made.base) == checkout.pin.base_tree
    assert source.tree_of(made.path, made.head) == checkout.pin.patched_tree
