"""The demo SECOND (config, weights) and the sample frame, as data."""
