"""Checkpoints on disk: which tensors a layout has, how their numbers are stored, and the files that hold them."""
