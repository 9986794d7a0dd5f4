"""Prompt texts, made here: English from a seed, so that every run has the same."""
