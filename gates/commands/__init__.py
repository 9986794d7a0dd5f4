"""The commands of ``python -m gates``."""
