"""Serving benchmark: one bounded load on several servers of the same model, in alternating rounds."""
