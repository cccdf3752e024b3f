"""The ``tpirt`` command: arguments to options, and errors to exit codes."""
