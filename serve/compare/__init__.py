"""Decide whether two answers are the same: assignment, tolerances, labels."""
