"""The ``tpirt`` command: turns arguments into options and errors into exit codes."""
