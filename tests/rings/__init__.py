"""What ``./test.sh`` runs: the environments, the parts of ring 0, and the table at the end.

Standard library alone: it starts on a bare Python 3.10 to 3.14.
"""
