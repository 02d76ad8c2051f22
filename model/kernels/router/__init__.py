"""Choosing and weighing the experts of each token, and the loss that balances them."""
