"""Benchmark of how a sparse-convolution model scales with points per frame and frames per batch.

Point clouds are synthetic: rolling ground with boxes on it, points uniform over the model's range, so that twice the
points occupy about twice the voxels. The model's limit on voxels is lifted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from serve.errors import SetupError
from serve.protocol.options import FrameOptions
from serve.runtime.detector import Detector
from serve.settings import Limits
from serve.verify.stages import Stopwatch, time_stages

__all__ = ["BATCHES", "POINTS", "Row", "Scaling", "run", "synthetic_cloud"]

POINTS = (10_000, 30_000, 100_000, 300_000, 1_000_000)
BATCHES = (1, 2, 4, 8)
POINTS_OF_BATCHES = 30_000


@dataclass(frozen=True)
class Row:
    """One size: points per frame, frames per batch, voxels of the batch, and minimum seconds by stage."""

    points: int
    batch: int
    voxels: int
    voxelize: float
    encode: float
    total: float


@dataclass(frozen=True)
class Scaling:
    """All rows of one model."""

    model: str
    device: str
    threads: int
    rounds: int
    rows: tuple[Row, ...]

    def table(self) -> str:
        """Format a table of milliseconds, and nanoseconds per point for the stages that should grow with it."""
        lines = [
            f"{self.model}, synthetic, {self.device} with {self.threads} threads, minimum of {self.rounds} rounds",
            f"{'points':>9}{'batch':>7}{'voxels':>9}{'voxelize':>10}{'':>10}{'encode':>10}{'':>10}{'whole':>10}",
            f"{'a frame':>9}{'':>16}" + f"{'ms':>10}{'ns/point':>10}" * 2 + f"{'ms':>10}{'ms/frame':>10}",
        ]
        for row in self.rows:
            each = 1e9 / (row.points * row.batch)
            lines.append(
                f"{row.points:>9}{row.batch:>7}{row.voxels:>9}{row.voxelize * 1e3:>10.1f}{row.voxelize * each:>10.0f}"
                f"{row.encode * 1e3:>10.1f}{row.encode * each:>10.0f}{row.total * 1e3:>10.1f}"
                f"{row.total * 1e3 / row.batch:>10.1f}"
            )
        return "\n".join(lines)

    def json_line(self) -> str:
        """Format all rows as one line of JSON."""
        return json.dumps({"scaling": asdict(self)})


def run(
    detector: Detector,
    *,
    points: Sequence[int] = POINTS,
    batches: Sequence[int] = BATCHES,
    rounds: int = 3,
    progress: Callable[[int], None] = lambda done: None,
) -> Scaling:
    """Measure one frame of each of `points`, then each of `batches` of `POINTS_OF_BATCHES` points per frame.

    Args:
        detector: detector of a LiDAR model with hard voxelization.
        points: points per frame.
        batches: frames per batch.
        rounds: counted rounds, after one warm-up round.
        progress: called with the number of sizes done.

    Raises:
        SetupError: the model has no hard voxelization.
    """
    network: Any = detector.network
    layer: Any = getattr(getattr(network, "data_preprocessor", None), "voxel_layer", None)
    if not hasattr(layer, "max_voxels"):
        raise SetupError(
            f"{detector.metadata.name} has no hard voxelization; choose a model that has, as second"
        )
    bounds = np.asarray(layer.point_cloud_range, dtype=np.float64)
    kept, rows = layer.max_voxels, []
    sizes = [(n, 1) for n in points] + [(POINTS_OF_BATCHES, n) for n in batches]
    try:
        for done, (n, batch) in enumerate(sizes):
            layer.max_voxels = (n, n)
            rows.append(
                _measure(detector, [synthetic_cloud(n, bounds, seed) for seed in range(batch)], rounds)
            )
            progress(done + 1)
    finally:
        layer.max_voxels = kept
    return Scaling(detector.metadata.name, str(detector.device), torch.get_num_threads(), rounds, tuple(rows))


def _measure(detector: Detector, clouds: Sequence[npt.NDArray[np.float32]], rounds: int) -> Row:
    width = detector.metadata.load_dim or 4
    frames = [
        detector.decode(np.pad(one, ((0, 0), (0, width - 4))).tobytes(), FrameOptions(), Limits())
        for one in clouds
    ]
    samples = [detector.prepare(frame) for frame in frames]
    voxels = 0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal voxels
        voxels = len(output["inputs"]["voxels"]["voxels"])

    network: Any = detector.network
    cuda = detector.device.type == "cuda"
    runs = []
    for _ in range(rounds + 1):
        stopwatch = Stopwatch(torch.cuda.synchronize if cuda else lambda: None)
        hook = network.data_preprocessor.register_forward_hook(count)
        with time_stages(network, stopwatch):
            started = time.perf_counter()
            detector.forward(samples)
            total = time.perf_counter() - started
        hook.remove()
        runs.append((stopwatch.seconds["voxelize"], stopwatch.seconds["encode"], total))
    least = [min(seconds) for seconds in zip(*runs[1:], strict=True)]
    return Row(len(clouds[0]), len(clouds), voxels, *least)


def synthetic_cloud(points: int, bounds: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float32]:
    """Generate (points, 4) float32: x, y, z in metres within `bounds` (minima, maxima), and intensity."""
    rng = np.random.default_rng(seed)
    low, high = bounds[:3], bounds[3:]
    xy = low[:2] + rng.random((points, 2)) * (high[:2] - low[:2])
    middle, height = (low[2] + high[2]) / 2, high[2] - low[2]
    z = middle + 0.1 * height * np.sin(xy[:, 0] / 9) * np.cos(xy[:, 1] / 7) + rng.normal(0, 0.02, points)
    # Of blocks of 4 m, every ninth has points up to 30 % of the height above the ground.
    block = np.floor(xy / 4).astype(np.int64)
    boxed = (block[:, 0] + 5 * block[:, 1]) % 9 == 0
    z[boxed] += rng.random(int(boxed.sum())) * 0.3 * height
    inside = np.clip(z, low[2] + 1e-3, high[2] - 1e-3)
    return np.column_stack((xy, inside, rng.random(points))).astype(np.float32)
