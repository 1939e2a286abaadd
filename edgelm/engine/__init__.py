"""The forward pass: what an architecture is, what a backend is, and how the two meet.

Ids go in, logits and ids come out; text, files and memory policy live elsewhere.
"""
