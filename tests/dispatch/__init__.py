"""Tests of the dispatch: which path each patched function of vLLM takes.

A package, so that the fake platform goes when the last test of this folder is done.
"""
