"""Drafts: guesses of the next tokens, which one step verifies together (speculative decoding)."""
