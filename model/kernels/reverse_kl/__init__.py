"""Reverse KL of a student against a teacher over the whole vocabulary, without all logits at once."""
