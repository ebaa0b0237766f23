"""What a model sees, as counts in fixed bins: statistics of frames and detections, and their distance to a reference.

Needs numpy and pydantic. A worker counts (`serve.watch.observation`), the gateway adds up and compares
(`serve.gateway.watching`), ``mmdet3d-serve reference`` records a reference (`serve.watch.reference`).
"""

from __future__ import annotations

__all__: list[str] = []
