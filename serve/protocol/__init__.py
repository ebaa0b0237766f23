"""Formats that travel: frames, batches of frames, images, calibrations, and the worker's socket protocol."""
