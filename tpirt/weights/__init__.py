"""Weights: checkpoints, slices, the slice store and the weight streamer."""
