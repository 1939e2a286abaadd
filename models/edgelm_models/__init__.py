"""Architectures that edgelm knows, one file each, and the catalogue of models that it can fetch."""
