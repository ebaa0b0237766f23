"""Inputs for every kernel at inference sizes."""
