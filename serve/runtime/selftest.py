"""Self-test: a loaded detector must reproduce the answer that its archive recorded for the golden frame.

It also warms up compiled kernels, memory and algorithm selection for the first request.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from serve.archive import Archive
from serve.compare.detections import Comparison, Tolerances, compare_answers
from serve.compare.labels import LabelComparison
from serve.errors import SelfTestError, ServeError
from serve.protocol.batch import Body
from serve.protocol.frames import FrameOptions, Limits
from serve.runtime.custom_code import explain_missing
from serve.runtime.detector import Detector

__all__ = ["TOLERANCES", "matches", "run_golden_frame", "self_test"]

# Wider than the differences between runs on one machine, because other processors sum in another order. Answers in
# reduced precision are compared with one in float32.
TOLERANCES: dict[str, Tolerances] = {
    "off": Tolerances(box_m=1e-2, box_px=1.0, yaw_rad=1e-2, score=1e-3, mask_iou=0.9, label_share=0.99),
    "fp16": Tolerances(box_m=0.1, box_px=4.0, yaw_rad=5e-2, score=2e-2, mask_iou=0.8, label_share=0.95),
    "bf16": Tolerances(box_m=0.3, box_px=8.0, yaw_rad=0.1, score=5e-2, mask_iou=0.7, label_share=0.9),
}
# Rounding decides which of two nearly tied candidates NMS keeps.
MAX_MISMATCH_SHARE = 0.05


def run_golden_frame(detector: Detector, frame: Body) -> dict[str, Any]:
    """Run the golden frame without a score threshold.

    Raises:
        SelfTestError: the frame cannot be run.
    """
    num_points = 0 if not frame else None  # an empty file is an empty point cloud
    load_dim = detector.describe().get("load_dim")
    options = FrameOptions(num_points=num_points, load_dim=load_dim)
    decoded = detector.decode(frame, options, Limits())
    detector.expect_intensities_of(decoded)
    outcome = detector.run([decoded])[0]
    if isinstance(outcome, ServeError):
        cause = outcome.__cause__
        missing = explain_missing(cause) if cause is not None else None
        shown = missing or (f"{type(cause).__name__}: {cause}" if cause is not None else str(outcome))
        raise SelfTestError(f"the golden frame cannot be run: {shown}") from cause
    return {name: value for name, value in outcome.items() if name != "warnings"}


def matches(
    expected: Mapping[str, Any], actual: Mapping[str, Any], tolerances: Tolerances
) -> tuple[bool, Comparison | LabelComparison]:
    """Compare answers: all but `MAX_MISMATCH_SHARE` of the detections must match, or of the labels be equal."""
    found = compare_answers(expected, actual, tolerances, sides=("recorded", "now"))
    if isinstance(found, LabelComparison):
        return found.ok, found
    wrong = sum(not pair.ok for pair in found.pairs) + max(
        len(found.unmatched_expected), len(found.unmatched_actual)
    )
    allowed = MAX_MISMATCH_SHARE * max(found.expected_count, found.actual_count)
    return not found.problems and wrong <= allowed, found


def self_test(detector: Detector, archive: Archive) -> float:
    """Run the golden frame and compare its answer; return the seconds it took.

    Raises:
        SelfTestError: the answer differs from the recorded one.
    """
    started = time.perf_counter()
    actual = run_golden_frame(detector, archive.golden_frame())
    seconds = time.perf_counter() - started
    expected = archive.golden_expected()
    ok, found = matches(expected, actual, TOLERANCES[archive.metadata.inference.autocast])
    if not ok:
        raise SelfTestError(
            f"the self-test of {archive.metadata.name} failed: the golden frame's answer differs from the recorded one "
            f"({'; '.join((found.verdict(), *getattr(found, 'problems', ())))}); "
            "convert the model again with this version of mmdet3d-serve and torch"
        )
    return seconds
