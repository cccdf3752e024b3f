"""Collectives: combine partial results of all ranks over links."""
