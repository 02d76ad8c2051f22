"""Running model-written code and scorers in isolated processes."""
