"""The forward pass of one rank, on a communicator and a source of weights."""
