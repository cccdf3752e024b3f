"""Kernels in C: :mod:`library` finds or compiles them."""
