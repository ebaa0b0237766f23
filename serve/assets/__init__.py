"""The demonstration SECOND (config, weights) and the sample frame, as data."""
