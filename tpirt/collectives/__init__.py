"""Combining partial results of all ranks, over channels of any transport."""
