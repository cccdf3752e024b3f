"""Emulated links: devices in network namespaces, joined by links of a given delay and rate."""
