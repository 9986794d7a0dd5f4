"""Tests of this repository, one folder a part; README.md says which proves what."""
