"""What of the model zoos can be served: every family tried with random weights, and the page that says so."""
