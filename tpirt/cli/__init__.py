"""The ``tpirt`` command: arguments to options, everything below composed, errors to exit codes."""
