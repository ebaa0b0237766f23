"""Kernels in Triton, for the work that takes plain torch many launches; imported only where they are used.

Compiled on a CUDA device, or interpreted on the CPU (``TRITON_INTERPRET=1``, by the tests). `serve.ops.device_kernels`
decides whether they are used; the torch versions remain for all else. No kernel adds floats by atomics, and none
chooses its blocks by the number of voxels or boxes, so a frame has the same bits alone and in a batch.
"""
