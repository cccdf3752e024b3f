"""Weights on their way: checkpoint, slices, store, and the window they pass through."""
