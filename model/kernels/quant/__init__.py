"""Rounding to FP8 and MXFP4 with a power-of-two scale a group of consecutive elements."""
