"""Pure tensor functions and raw buffers; nothing here knows of ranks, files or peers."""
