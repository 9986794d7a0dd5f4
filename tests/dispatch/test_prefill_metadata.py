"""The kernel of the prefill metadata, in Triton's interpreter (see ``interpreted/``)."""

from __future__ import annotations


def test_the_kernel_is_right_and_stays_inside_its_tensors(cuda, interpreted):
    interpreted.require("check_prefill_metadata", at_least=14)
