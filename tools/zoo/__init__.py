"""Coverage of the model zoos: probe every family with random weights, and report the results."""
