"""Upstream's own inference, in this process or in an environment with compiled kernels."""
