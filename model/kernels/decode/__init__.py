"""Decoding on a CPU as compiled loops over rows: no library call, so small batches and any number of rows cost only their arithmetic."""
