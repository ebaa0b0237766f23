"""Comparison of two versions of a model on the same frames: ``mmdet3d-serve compare``."""
