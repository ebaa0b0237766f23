"""Self-test: a loaded detector must reproduce the answer that its archive recorded for the golden frame.

It also warms up compiled kernels, memory and algorithm selection for the first request.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from serve.archive import Archive
from serve.compare.detections import Comparison, compare_answers
from serve.compare.labels import LabelComparison
from serve.compare.ties import confirm_ties
from serve.compare.tolerances import Tolerances, tolerances_for
from serve.errors import ArchiveError, SelfTestError, ServeError
from serve.protocol.batch import Body
from serve.protocol.options import FrameOptions
from serve.runtime.custom_code import explain_missing
from serve.runtime.detector import Detector
from serve.runtime.rounding import variants
from serve.settings import Limits

__all__ = ["compare_with_recorded", "run_golden_frame", "self_test"]


def run_golden_frame(detector: Detector, frame: Body) -> dict[str, Any]:
    """Run the golden frame without a score threshold.

    Raises:
        ArchiveError: the archive has a step that no server can run.
        SelfTestError: the frame cannot be run.
    """
    num_points = 0 if not frame else None  # an empty file is an empty point cloud
    load_dim = detector.describe().get("load_dim")
    options = FrameOptions(num_points=num_points, load_dim=load_dim)
    decoded = detector.decode(frame, options, Limits())
    detector.expect_intensities_of(decoded)
    outcome = detector.run([decoded])[0]
    if isinstance(outcome, ArchiveError):
        raise outcome
    if isinstance(outcome, ServeError):
        cause = outcome.__cause__
        missing = explain_missing(cause) if cause is not None else None
        shown = missing or (f"{type(cause).__name__}: {cause}" if cause is not None else str(outcome))
        raise SelfTestError(f"the golden frame cannot be run: {shown}") from cause
    return {name: value for name, value in outcome.items() if name != "warnings"}


def compare_with_recorded(
    detector: Detector,
    recorded: Mapping[str, Any],
    now: Mapping[str, Any],
    frame: Body,
    tolerances: Tolerances,
) -> Comparison | LabelComparison:
    """Compare an answer to the golden frame with a recorded one.

    Args:
        detector: the detector at hand; if the answers differ, it runs the frame again for its variants, which tell ties
            from mismatches (`serve.compare.ties`).
        recorded: answer of another detector, or of this one in another state.
        now: answer of `detector`.
        frame: the golden frame.
        tolerances: limits of equality.
    """
    found = compare_answers(now, recorded, tolerances, sides=("new", "recorded"))

    def run() -> dict[str, Any]:
        with detector.guarded():
            return run_golden_frame(detector, frame)

    return confirm_ties(found, now, recorded, variants(detector.network, run))


def self_test(detector: Detector, archive: Archive) -> float:
    """Run the golden frame and compare its answer; return the seconds it took.

    Raises:
        ArchiveError: the network does more than a network may, and the archive is not trusted.
        SelfTestError: the answer differs from the recorded one.
    """
    started = time.perf_counter()
    frame = archive.golden_frame()
    with detector.guarded():
        now = run_golden_frame(detector, frame)
    seconds = time.perf_counter() - started
    found = compare_with_recorded(
        detector,
        archive.golden_expected(),
        now,
        frame,
        tolerances_for(detector.device, archive.metadata.inference.autocast),
    )
    if not found.ok:
        raise SelfTestError(
            f"the self-test of {archive.metadata.name} failed: the golden frame's answer differs from the recorded one "
            f"({'; '.join((found.verdict(), *getattr(found, 'problems', ())))}); "
            "convert the model again with this version of mmdet3d-serve and torch"
        )
    return seconds
