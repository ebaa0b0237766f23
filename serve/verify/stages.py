"""Stopwatch around the parts of a detector.

Parts are found by OpenMMLab's attribute names; parts that a detector lacks are skipped. `tools.bench.reference.worker`
loads this file by path, so it may import the standard library only.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["STAGES", "Stopwatch", "time_stages"]

# Stage → (attributes, methods). A method that is called from within another one is timed in both. mmdet3d's detectors
# with several branches (CenterPoint, MVX) name their parts `pts_*` and `img_*`.
STAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "voxelize": (("data_preprocessor", "forward"),),
    "encode": tuple(
        (f"{branch}{part}", "forward")
        for branch in ("", "pts_")
        for part in ("voxel_encoder", "middle_encoder")
    ),
    "dense": (
        *((f"{branch}{part}", "forward") for branch in ("", "pts_", "img_") for part in ("backbone", "neck")),
        ("rpn_head", "forward"),
    ),
    "attend": (("encoder", "forward"), ("decoder", "forward")),
    "head": tuple(
        (head, method)
        for head in ("bbox_head", "pts_bbox_head")
        for method in ("forward", "predict_heatmaps")
    ),
    "select": tuple(
        (head, method)
        for head in ("bbox_head", "pts_bbox_head", "rpn_head")
        for method in ("predict_by_feat", "predict_boxes")
    ),
    "regions": (("roi_head", "predict"),),
}


class Stopwatch:
    """Seconds per stage, summed over one run."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        """Use `synchronize` to wait for the device, so that a stage is charged with its own work only."""
        self.synchronize = synchronize
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function` so that its time is charged to `stage`."""

        def measure(*args: Any, **kwargs: Any) -> Any:
            self.synchronize()
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.synchronize()
                self.seconds[stage] += time.perf_counter() - started

        return measure


@contextmanager
def time_stages(network: Any, stopwatch: Stopwatch) -> Iterator[None]:
    """Measure calls of the network's parts inside the block; restore them afterwards."""
    touched = []
    for stage, places in STAGES.items():
        for attribute, method in places:
            part = getattr(network, attribute, None)
            if part is not None and hasattr(part, method):
                setattr(part, method, stopwatch.around(stage, getattr(part, method)))
                touched.append((part, method))
    try:
        yield
    finally:
        for part, method in touched:
            delattr(part, method)
