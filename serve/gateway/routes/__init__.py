"""HTTP routes: predictions, the KServe v2 protocol, health and metrics."""
