"""Prove that a served model equals native PyTorch."""
