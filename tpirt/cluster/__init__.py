"""Membership: the master's group, the worker's service, local processes, slices on their way."""
