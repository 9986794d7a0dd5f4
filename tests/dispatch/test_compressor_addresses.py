"""vLLM's Triton compressors at the first window, in Triton's interpreter (see ``interpreted/``)."""

from __future__ import annotations


def test_the_kernels_are_right_and_stay_inside_their_tensors(cuda, interpreted):
    interpreted.require("check_compressor_addresses", at_least=8)
