"""Bytes and frames between peers: TCP, gRPC, and an in-memory pair for tests.

The only package that imports ``grpc``. It knows nothing of what a message says.
"""
