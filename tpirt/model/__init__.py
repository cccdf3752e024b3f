"""One rank's forward pass: it sees a communicator and a source of weights, no socket, no path."""
