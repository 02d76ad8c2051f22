"""Attention over a sliding window and compressed entries, with a sink, on packed rows."""
