"""Benchmarks: the physical floor beside every figure, a table first, one JSON line last."""
