"""The one standard of equality; docs/decisions/0014-equality.md has its reasons and figures.

Two computations of the same model are equal if every value agrees within these limits. Conversion (folding), self-test
and ``mmdet3d-serve verify`` use them alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.errors import SettingsError

__all__ = ["MAX_TIE_SHARE", "TOLERANCES", "Tolerances", "tolerances_for"]

# Share of the detections that may be exchanged for others of the same score.
MAX_TIE_SHARE = 0.05


@dataclass(frozen=True)
class Tolerances:
    """Limits of equality, all inclusive; the defaults are those of float32.

    Attributes:
        box_m: metres (and m/s for velocities) between values of 3D boxes.
        box_px: pixels between corners of 2D boxes.
        yaw_rad: radians between headings, modulo a full turn.
        score: between scores.
        mask_iou: least intersection over union of two masks.
        label_share: least share of points or pixels with the same label, for predictions of labels.
        size_share: what a length, width or height of a 3D box may deviate on top of `box_m`, as a share of itself:
            networks give its logarithm. The bottom may deviate as the height.
        mask_px: pixels in which two masks may differ whatever their IoU: a few flip on the outline of a small object.
    """

    box_m: float = 1e-3
    box_px: float = 0.05
    yaw_rad: float = 1e-3
    score: float = 2e-4
    mask_iou: float = 0.99
    label_share: float = 0.999
    size_share: float = 2e-4
    mask_px: int = 4

    def __post_init__(self) -> None:
        """Reject limits that could never be met or would hide every deviation."""
        for name in ("box_m", "box_px", "yaw_rad", "score", "size_share"):
            if not 0 <= getattr(self, name) < np.inf:
                raise SettingsError(
                    f"tolerance {name} must be a finite number >= 0, not {getattr(self, name)}"
                )
        for name in ("mask_iou", "label_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"tolerance {name} must lie between 0 and 1, not {getattr(self, name)}")


#: Limits by the precision in which one of the two sides computes. TF32 is CUDA's default for convolutions.
TOLERANCES: dict[str, Tolerances] = {
    "float32": Tolerances(),
    "tf32": Tolerances(box_m=1e-2, box_px=1.0, yaw_rad=1e-2, score=1e-3, mask_iou=0.9, label_share=0.99),
    "fp16": Tolerances(box_m=0.1, box_px=4.0, yaw_rad=5e-2, score=2e-2, mask_iou=0.8, label_share=0.95),
    "bf16": Tolerances(box_m=0.3, box_px=8.0, yaw_rad=0.1, score=5e-2, mask_iou=0.7, label_share=0.9),
}


def tolerances_for(device: Any, autocast: str = "off") -> Tolerances:
    """Limits for what is computed on a torch device: a CPU computes in float32 whatever `autocast` says."""
    if str(device).partition(":")[0] != "cuda":
        return TOLERANCES["float32"]
    return TOLERANCES["tf32" if autocast == "off" else autocast]
