"""One worker peer's process: listens, serves masters one after another, ends cleanly."""
