"""Benchmarks of the kernels, a folder for each operation: ``python -m benchmarks.OP.bench_X``."""
