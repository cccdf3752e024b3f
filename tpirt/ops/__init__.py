"""Pure tensor functions and raw buffers, independent of ranks, files and peers."""
