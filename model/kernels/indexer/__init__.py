"""Choose the compressed entries that each query attends to."""
