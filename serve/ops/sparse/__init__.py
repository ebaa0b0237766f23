"""Sparse convolution: rulebooks, neighbour tables, gather-scatter."""
