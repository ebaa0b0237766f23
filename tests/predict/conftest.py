"""Fixtures: clouds of the demo's scene, turned step by step; a made video; the demo SECOND in process."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from serve.convert.golden import golden_image
from serve.predict import LocalModel, open_archive
from tests.gateway.conftest import backend, background, gateway, start_gateway, torchserve

__all__ = ["backend", "background", "gateway", "start_gateway", "torchserve"]


@pytest.fixture(scope="session")
def second(demo_mar: Path) -> Iterator[LocalModel]:
    with open_archive(demo_mar, "cpu") as model:
        yield model


@pytest.fixture(scope="session")
def turned(street: np.ndarray) -> Any:
    """`turned(3)`: the demo's scene as a ``.bin``, turned by three steps."""

    def make(step: int) -> bytes:
        angle = 0.05 * step
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        cloud = street.copy()
        cloud[:, :2] = cloud[:, :2] @ turn
        return cloud.astype("<f4").tobytes()

    return make


@pytest.fixture
def clouds(tmp_path: Path, turned: Any) -> Path:
    """A folder of three clouds."""
    folder = tmp_path / "velodyne"
    folder.mkdir()
    for k in range(3):
        (folder / f"{k:06d}.bin").write_bytes(turned(k))
    return folder


def write_video(
    path: Path,
    count: int = 6,
    *,
    rate: Fraction = Fraction(30000, 1001),
    size: tuple[int, int] = (160, 120),
    rotation: int | None = None,
    times: list[int] | None = None,
) -> Path:
    """A video of a still street over which the view moves.

    `rotation` in degrees counter-clockwise is put into the file, not into the pixels; `times` are presentation times
    in units of 1 / `rate`.
    """
    street = golden_image(640, 480)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"crf": "10"}
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for k in range(count):
            view = np.ascontiguousarray(street[8 * k : 8 * k + size[1], 12 * k : 12 * k + size[0]])
            frame = av.VideoFrame.from_ndarray(view, format="bgr24")
            if times is not None:
                frame.pts, frame.time_base = times[k], 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    """A video of six frames."""
    return write_video(tmp_path / "drive.mp4")
