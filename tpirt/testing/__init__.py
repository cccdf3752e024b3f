"""Test tools: tiny models, a tensor-parallel group within one process, a faulty channel.

Nothing in tpirt imports this room.
"""
