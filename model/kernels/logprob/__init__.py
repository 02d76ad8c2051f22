"""Log-probabilities of given tokens, without all logits at once."""
