"""Counts of what one frame asks of an accelerator, on a stand-in for CUDA: no device is needed.

A GPU runs an operator of a detector in a few microseconds, and as many are needed to launch it; while the processor
waits for a result, nothing is launched. So the two counts say what no processor's time can.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from serve import archive
from serve.compare.detections import compare
from serve.compare.tolerances import TOLERANCES
from serve.errors import ServeError
from serve.protocol.options import FrameOptions
from serve.runtime import load_detector
from serve.runtime.accelerator.stand_in import DEVICE, stand_in_device
from serve.settings import Limits

__all__ = ["BOUNDS", "WAITING_PER_IMAGE", "OperatorBenchmark", "Row", "count"]

# Most operators and synchronisations of one frame.
BOUNDS = {
    "second": (500, 3),
    "pointpillars": (300, 3),
    "centerpoint": (700, 4),
    "faster-rcnn": (900, 5),
    "mask-rcnn": (1100, 5),
    "retinanet": (350, 11),
    "rtmdet-s": (300, 7),
}
# Their selection waits image by image, that of the others once per batch.
WAITING_PER_IMAGE = frozenset({"retinanet", "rtmdet-s"})


@dataclass(frozen=True)
class Row:
    """Counts of one model.

    Attributes:
        operators: operators on the device, views left out.
        synchronisations: times that the processor waits.
        uploads: copies to the device.
        kinds: synchronisations by kind.
        most: the most frequent operators.
        equal: whether the answer is that of the loops on the CPU, within the standard of equality.
        detections: number of detections.
        largest_box: largest deviation of a box, metres or pixels.
        largest_score: largest deviation of a score.
    """

    model: str
    operators: int
    synchronisations: int
    uploads: int
    kinds: dict[str, int]
    most: dict[str, int]
    equal: bool
    detections: int
    largest_box: float
    largest_score: float

    @property
    def within_bounds(self) -> bool:
        """Whether the counts are within `BOUNDS`; a model that has none is."""
        most = BOUNDS.get(self.model)
        return most is None or (self.operators <= most[0] and self.synchronisations <= most[1])


@dataclass(frozen=True)
class OperatorBenchmark:
    """Rows of all models."""

    torch: str
    rows: list[Row] = field(default_factory=list)

    def table(self) -> str:
        """Format a table of the models with their bounds."""
        lines = [
            f"one frame on a stand-in for {DEVICE}, torch {self.torch}",
            f"{'model':<20}{'operators':>10}{'at most':>9}{'waits':>7}{'at most':>9}{'uploads':>9}{'equal':>7}",
        ]
        for row in self.rows:
            most = BOUNDS.get(row.model, ("-", "-"))
            equal = "yes" if row.equal else "NO"
            lines.append(
                f"{row.model:<20}{row.operators:>10}{most[0]:>9}{row.synchronisations:>7}{most[1]:>9}"
                f"{row.uploads:>9}{equal:>7}"
            )
        return "\n".join(lines)

    def json_line(self) -> str:
        """Format all fields as one line of JSON."""
        return json.dumps(asdict(self))


def count(opened: archive.Archive, body: Any) -> Row:
    """Run one frame on the CPU and on the stand-in; count the second run of the latter, as the first one plans.

    Args:
        opened: unpacked archive.
        body: frame, as a client sends it.

    Raises:
        ServeError: the model cannot run this frame.
    """
    loops = load_detector(opened, torch.device("cpu"))
    expected = _run(loops, body)
    with stand_in_device() as device:
        detector = load_detector(opened, DEVICE)
        _run(detector, body)
        device.reset()
        got = _run(detector, body)
        counts = device.counts
    shared = {key: value for key, value in got.items() if key in expected}
    found = compare(expected, shared, TOLERANCES["float32"], sides=("loops", "device"))
    return Row(
        model=opened.metadata.name,
        operators=counts.operator_count,
        synchronisations=counts.synchronisation_count,
        uploads=counts.uploads,
        kinds=dict(counts.synchronisations),
        most=dict(counts.operators.most_common(8)),
        equal=found.ok,
        detections=found.expected_count,
        largest_box=found.largest_box,
        largest_score=found.largest_score,
    )


def _run(detector: Any, body: Any) -> dict[str, Any]:
    (outcome,) = detector.run([detector.decode(body, FrameOptions(), Limits())])
    if isinstance(outcome, ServeError):
        raise outcome
    answer: dict[str, Any] = outcome
    return answer
