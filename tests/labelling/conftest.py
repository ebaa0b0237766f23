"""A gateway whose model for images answers two boxes with masks, and one for clouds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import cv2
import httpx
import numpy as np
import orjson
import pytest
from pycocotools import mask as coco

from serve.labelling.options import LabelStudioOptions
from serve.labelling.server import create_backend
from tests.gateway import fake_torchserve
from tests.gateway.conftest import (  # noqa: F401
    RunningGateway,
    backend,
    background,
    start_gateway,
    torchserve,
)
from tests.gateway.fake_torchserve import CLOUDS, IMAGES, FakeModel
from tests.gateway.running import Listening, eventually

WIDTH, HEIGHT = 40, 30
BOXES = [[4.0, 6.0, 20.0, 18.0], [30.0, 10.0, 45.0, 40.0]]  # the second one reaches out of the image
NAMES = ["Car", "Pedestrian"]
CUBOID = [10.0, 2.0, -1.5, 4.0, 1.8, 1.6, 0.5]


def masks() -> np.ndarray:
    """Two masks: a disc, and a rectangle with a hole."""
    found = np.zeros((2, HEIGHT, WIDTH), bool)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    found[0] = (rows - 12) ** 2 + (columns - 12) ** 2 < 30
    found[1, 10:30, 30:40] = True
    found[1, 15:20, 33:36] = False
    return found


def answer_for(frame: Any, options: dict[str, Any]) -> bytes:
    if isinstance(frame, bytes) and frame.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF")):
        threshold = options.get("score_thr", 0)
        kept = [i for i, score in enumerate((0.9, 0.4)) if score >= threshold]
        packed = [coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks()]
        return orjson.dumps(
            {
                "bboxes": [BOXES[i] for i in kept],
                "scores": [(0.9, 0.4)[i] for i in kept],
                "labels": kept,
                "names": [NAMES[i] for i in kept],
                "masks": [{"size": packed[i]["size"], "counts": packed[i]["counts"].decode()} for i in kept],
            }
        )
    answer = {"bboxes_3d": [CUBOID, CUBOID], "scores_3d": [0.9, 0.8], "labels_3d": [0, 1], "names": NAMES}
    return orjson.dumps({**answer, "box_type_3d": "LiDAR"})


@dataclass
class Served:
    gateway: RunningGateway
    torchserve: Any

    @property
    def url(self) -> str:
        return self.gateway.url


@pytest.fixture
def served(start_gateway, torchserve, monkeypatch) -> Iterator[Served]:  # noqa: F811
    monkeypatch.setattr(fake_torchserve, "answer_for", answer_for)
    torchserve.models = {"images": {"1.0": FakeModel(IMAGES)}, "clouds": {"1.0": FakeModel(CLOUDS)}}
    gateway = start_gateway()
    eventually(lambda: all(model["status"] == "ready" for model in gateway.client.get("/models").json()))
    yield Served(gateway, torchserve)


@pytest.fixture
def png() -> bytes:
    picture = np.random.default_rng(1).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return cv2.imencode(".png", picture)[1].tobytes()


@pytest.fixture
def start_backend(background, served) -> Iterator[Callable[..., httpx.Client]]:  # noqa: F811
    with ExitStack() as stack:

        def start(**options: Any) -> httpx.Client:
            app = create_backend(
                LabelStudioOptions(
                    **{"gateway_url": served.url, "model": "images", "score_thr": 0.0, **options}
                )
            )
            listening = Listening(background, app)
            stack.callback(listening.close)
            return stack.enter_context(httpx.Client(base_url=listening.url, trust_env=False, timeout=20))

        yield start
