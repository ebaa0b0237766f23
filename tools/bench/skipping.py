"""Benchmark of skipping background: which share of each layer is computed, what it saves, and that no bit changes.

Times are with and without skipping, by the same loops, in alternating rounds. Bits are compared on synthetic clouds
from a single point to one that fills the model's range.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from serve.errors import ServeError, SetupError
from serve.ops.cpu import masked_conv
from serve.protocol.frames import Frame
from serve.protocol.options import FrameOptions
from serve.runtime import background
from serve.runtime.background_model import BackgroundModel
from serve.runtime.detector import Detector
from serve.runtime.masked import MaskedSequence
from serve.settings import Limits
from tools.bench.scaling import synthetic_cloud

__all__ = ["CLOUDS", "Layer", "Skipping", "run"]

CLOUDS = 50
_MOST_POINTS = 300_000


@dataclass(frozen=True)
class Layer:
    """One convolution: its kind, (B, H, W, C) of input and output, and the share of output cells that differ."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    differs: float


@dataclass(frozen=True)
class Skipping:
    """Shares by layer, and medians of seconds per frame.

    Attributes:
        equal_clouds: clouds whose network outputs have the same bits with and without skipping.
        clouds: clouds tried.
    """

    model: str
    frame: str
    threads: int
    rounds: int
    layers: tuple[Layer, ...]
    skipping_s: float
    full_s: float
    equal_clouds: int
    clouds: int

    def table(self) -> str:
        """Format a table of layers, then the times and the verdict."""
        lines = [
            f"{self.model}, {self.frame}, cpu with {self.threads} threads, median of {self.rounds} rounds",
            f"{'layer':<10}{'input':>20}{'output':>20}{'differs':>10}",
        ]
        for layer in self.layers:
            shapes = ("x".join(map(str, shape[1:])) for shape in (layer.inputs, layer.outputs))
            lines.append(
                f"{layer.kind:<10}" + "".join(f"{text:>20}" for text in shapes) + f"{layer.differs:>10.1%}"
            )
        lines.append(
            f"frame {self.skipping_s * 1e3:.1f} ms, {self.full_s * 1e3:.1f} ms without skipping: "
            f"{self.full_s / self.skipping_s:.2f} times faster"
        )
        lines.append(
            f"{self.equal_clouds} of {self.clouds} clouds have the same bits with and without skipping"
        )
        return "\n".join(lines)

    def json_line(self) -> str:
        """Format all fields as one line of JSON."""
        return json.dumps({"skipping": asdict(self)})


def run(
    detector: Detector,
    name: str,
    body: bytes,
    *,
    rounds: int = 7,
    clouds: int = CLOUDS,
    progress: Callable[[int], None] = lambda done: None,
) -> Skipping:
    """Measure one frame with and without skipping, and compare the bits of synthetic clouds.

    Raises:
        SetupError: the model has no part that skips background.
        ServeError: the model failed on a frame.
    """
    model = getattr(detector.network, "background", None)
    if not isinstance(model, BackgroundModel):
        raise SetupError(f"{detector.metadata.name} has no dense part that skips background; try second")
    frame = detector.decode(body, FrameOptions(), Limits())
    _run(detector, frame)
    with _observe() as layers:
        _run(detector, frame)
    times: dict[bool, list[float]] = {True: [], False: []}
    for done in range(rounds):
        for enabled in times:
            background.set_skipping(detector.network, enabled=enabled)
            started = time.perf_counter()
            _run(detector, frame)
            times[enabled].append(time.perf_counter() - started)
        progress(done + 1)
    equal = 0
    for k in range(clouds):
        cloud = _cloud(detector, k, clouds)
        outputs = []
        for enabled in (True, False):
            background.set_skipping(detector.network, enabled=enabled)
            outputs.append(_outputs(detector, cloud))
        equal += outputs[0] == outputs[1]
        progress(rounds + k + 1)
    background.set_skipping(detector.network, enabled=True)
    return Skipping(
        model=detector.metadata.name,
        frame=name,
        threads=torch.get_num_threads(),
        rounds=rounds,
        layers=tuple(layers),
        skipping_s=statistics.median(times[True]),
        full_s=statistics.median(times[False]),
        equal_clouds=equal,
        clouds=clouds,
    )


def _cloud(detector: Detector, k: int, clouds: int) -> bytes:
    """Return a cloud of one point in the first place, and growing ones up to one that fills the range in the last."""
    network: Any = detector.network
    bounds = np.asarray(network.data_preprocessor.voxel_layer.point_cloud_range, np.float64)
    points = int(_MOST_POINTS ** (k / max(1, clouds - 1)))
    width = detector.metadata.load_dim or 4
    return np.pad(synthetic_cloud(points, bounds, k), ((0, 0), (0, width - 4))).tobytes()


def _outputs(detector: Detector, body: bytes) -> list[bytes]:
    """Return the bytes of all maps that the heads return for a cloud."""
    frame = detector.decode(body, FrameOptions(), Limits())
    found: list[bytes] = []

    def keep(module: Any, inputs: Any, output: torch.Tensor) -> None:
        found.append(output.detach().contiguous().numpy().tobytes())

    parts = [
        module
        for name, module in detector.network.named_modules()
        if isinstance(module, MaskedSequence) and "head" in name and module.writes_background
    ]
    handles = [part.register_forward_hook(keep) for part in parts]
    try:
        _run(detector, frame)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _run(detector: Detector, frame: Frame) -> None:
    (outcome,) = detector.run([frame])
    if isinstance(outcome, ServeError):
        raise outcome


@contextmanager
def _observe() -> Iterator[list[Layer]]:
    """Record the convolutions that run inside the block."""
    layers: list[Layer] = []
    convolve = masked_conv.convolve

    def observed(x: Any, layer: masked_conv.ConvLayer, out: Any, *args: Any, **kwargs: Any) -> Any:
        marks = convolve(x, layer, out, *args, **kwargs)
        share = 1.0 if marks is None else float(marks.mean())
        layers.append(Layer(layer.kind, x.shape, (*out.shape[:3], layer.outputs), share))
        return marks

    masked_conv.convolve = observed
    try:
        yield layers
    finally:
        masked_conv.convolve = convolve
