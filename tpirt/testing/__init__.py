"""Test tools: tiny models, tensor-parallel groups in one process, faulty channels.

Nothing in tpirt imports this package.
"""
