"""Upstream's own CPU tests of what the series touches, against the installed wheel.

The rule: no test's outcome is worse than with upstream's wheel. ``map.toml`` says which tests
belong to which touched file, ``baseline.json`` what upstream's wheel gave. README.md in ``tests/``
explains both.
"""
