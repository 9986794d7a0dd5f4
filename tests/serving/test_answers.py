"""Every check, on vLLM's own server: with a scripted worker, and with a model on a GPU."""

import pytest

from tests.serving.checks import CHECKS


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_serving(served, check):
    check(served)
