"""Mixing the residual streams into a sub-layer's input and out of its output."""
