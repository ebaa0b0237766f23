"""The demo detector: synthetic LiDAR scenes, a small SECOND trained on them, and how good it is.

Importing this package imports nothing. It knows nothing about serving.
"""

from __future__ import annotations

__all__: list[str] = []
