"""Frames between peers: the wire format, gRPC, and an in-memory pair for tests.

The only room that imports ``grpc`` or the generated protobuf code's frames by hand.
"""
