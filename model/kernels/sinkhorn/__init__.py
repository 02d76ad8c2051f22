"""Alternate normalisation of the rows and columns of many small matrices."""
