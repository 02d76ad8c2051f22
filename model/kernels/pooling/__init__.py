"""Pooling of token blocks into compressed entries."""
