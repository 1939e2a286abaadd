"""BLAKE2b without OpenSSL: `hashlib` would load it, at 3.6 MB of the user's budget."""

from __future__ import annotations

try:
    from _blake2 import blake2b
except ImportError:  # an interpreter that keeps it elsewhere
    from hashlib import blake2b

__all__ = ["blake2b"]
