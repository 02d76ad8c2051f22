"""Normalising by the root mean square and rotating positions, in one pass each way."""
