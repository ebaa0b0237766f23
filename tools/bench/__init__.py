"""Timing this project against named alternatives, in one process, as ratios. Knows nothing about correctness."""
