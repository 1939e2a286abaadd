"""Speculative decoding: guess the next tokens, verify all guesses in one pass, keep what the model would have said."""
