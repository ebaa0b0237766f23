"""Kernels on point clouds: voxels, neighbours, sampling, grouping, scatter."""
