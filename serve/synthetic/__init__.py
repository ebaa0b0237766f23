"""Made data: LiDAR scenes with ground truth, pictures of shapes, and data sets of both in KITTI's and COCO's layout.

Needs numpy and OpenCV only. Importing this package imports nothing.
"""

from __future__ import annotations

__all__: list[str] = []
