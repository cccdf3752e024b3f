"""The process of a worker peer: listens, serves one master at a time, exits cleanly."""
