"""Benchmarks of this project against named alternatives, reported as ratios; tests check correctness."""
