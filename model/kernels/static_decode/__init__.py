"""What one decoding step does between its matrix products, in static shapes and without waiting for the host."""
