"""Deformable convolution and deformable attention."""
