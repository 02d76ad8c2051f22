"""The routed experts' feed-forward networks, each on its own tokens."""
