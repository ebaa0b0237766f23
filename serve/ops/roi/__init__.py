"""Kernels on regions of interest: align, pool, sampling."""
