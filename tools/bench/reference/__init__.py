"""Upstream's inference in a process of its own, in an environment with compiled kernels."""
