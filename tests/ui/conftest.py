"""Fixtures: the page in a headless Chromium, in front of a gateway and a fake TorchServe with known answers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import orjson
import pytest

from tests.gateway.conftest import (  # noqa: F401  # fixtures
    RunningGateway,
    backend,
    background,
    gateway,
    start_gateway,
    torchserve,
)
from tests.gateway.running import eventually

# x, y, z of the bottom's centre, length, width, height, yaw; score; label.
BOXES: list[tuple[list[float], float, int]] = [
    ([12.0, 3.0, -1.7, 4.2, 1.8, 1.6, 0.2], 0.91, 0),
    ([22.0, -4.0, -1.7, 4.0, 1.7, 1.5, 1.6], 0.62, 0),
    ([9.0, -3.5, -1.7, 0.7, 0.6, 1.8, 0.0], 0.45, 1),
    ([30.0, 8.0, -1.7, 4.4, 1.9, 1.6, -0.4], 0.12, 0),
]
CLASSES = ["Car", "Pedestrian"]
STEP_M = 0.25  # that the scene moves on from one frame to the next


CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


def scene_answer(frame: bytes | dict[str, bytes], options: dict[str, Any]) -> bytes:
    """The same boxes for every frame, moved on by what the frame's first number has behind its point."""
    points = frame if isinstance(frame, bytes) else frame.get("points", b"")
    step = float(np.frombuffer(points[:4], "<f4")[0]) if len(points) >= 4 else 0.0
    shift = step % 1.0
    return orjson.dumps(
        {
            "bboxes_3d": [[box[0] + shift, *box[1:]] for box, _, _ in BOXES],
            "scores_3d": [score for _, score, _ in BOXES],
            "labels_3d": [label for _, _, label in BOXES],
            "names": [CLASSES[label] for _, _, label in BOXES],
            "box_type_3d": "LiDAR",
            "classes": CLASSES,
        }
    )


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fake TorchServe answer with `BOXES`."""
    monkeypatch.setattr("tests.gateway.fake_torchserve.answer_for", scene_answer)


def make_cloud(number: int = 0, points: int = 4000) -> np.ndarray[Any, Any]:
    """(N, 4) float32: a ground with the boxes' surfaces on it, `number` steps on (at most three)."""
    random = np.random.default_rng(number)
    ground = np.stack(
        [
            random.uniform(-5, 45, points),
            random.uniform(-20, 20, points),
            random.normal(-1.7, 0.03, points),
            random.uniform(0, 0.3, points),
        ],
        1,
    )
    filled = []
    for box, _, _ in BOXES:
        unit = random.uniform(-0.5, 0.5, (300, 3))
        unit[np.arange(300), random.integers(0, 2, 300)] = 0.5
        x, y = unit[:, 0] * box[3], unit[:, 1] * box[4]
        c, s = np.cos(box[6]), np.sin(box[6])
        filled.append(
            np.stack(
                [
                    x * c - y * s + box[0],
                    x * s + y * c + box[1],
                    (unit[:, 2] + 0.5) * box[5] + box[2],
                    random.uniform(0.4, 1, 300),
                ],
                1,
            )
        )
    whole = np.concatenate([ground, *filled])
    whole[:, 0] += number * STEP_M
    whole[0, 0] = 20 + number * STEP_M
    return whole.astype(np.float32)


@dataclass
class Browsed:
    """A page, and what it must not have done: errors, and requests to other hosts."""

    page: Any
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def open(self, url: str) -> None:
        self.page.goto(url)

    def drop(self, *files: tuple[str, bytes]) -> None:
        """Open files as the user does with the button."""
        chosen = [
            {"name": name, "mimeType": "application/octet-stream", "buffer": body} for name, body in files
        ]
        self.page.locator("#files").set_input_files(chosen)

    def is_ready(self) -> None:
        self.page.locator("#model:not([disabled])").wait_for()

    def rows(self) -> list[str]:
        return [" ".join(text.split()) for text in self.page.locator("#found tbody tr").all_inner_texts()]


@pytest.fixture(scope="session")
def browser(pytestconfig: pytest.Config) -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="make test-ui has Playwright")
    path = find_chromium()
    if path is None:
        end = pytest.exit if pytestconfig.option.no_skips else pytest.skip
        end(f"the page's tests need one of {', '.join(CHROMIUM)} in PATH: apt-get install chromium")
    arguments = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")
    with sync_api.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=path, args=arguments)
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Browsed]]:
    """`open_page(url)`: a page in a context of its own; every test ends without an error on it."""
    opened: list[Browsed] = []
    contexts: list[Any] = []

    def open_one(url: str, **context: Any) -> Browsed:
        contexts.append(browser.new_context(**{"viewport": {"width": 1360, "height": 800}, **context}))
        browsed = Browsed(contexts[-1].new_page())
        browsed.page.set_default_timeout(15_000)
        browsed.page.on("pageerror", lambda error: browsed.errors.append(str(error)))
        browsed.page.on("console", lambda message: _note(browsed, message))
        browsed.page.on("request", lambda request: browsed.hosts.add(urlsplit(request.url).netloc))
        opened.append(browsed)
        browsed.open(url)
        return browsed

    yield open_one
    for context in contexts:
        context.close()
    for browsed in opened:
        assert not browsed.errors
        assert {host.partition(":")[0] for host in browsed.hosts} <= {"127.0.0.1", ""}


def _note(browsed: Browsed, message: Any) -> None:
    # A status of 4xx or 5xx, and a connection that is refused, are in the console of every browser.
    if message.type == "error" and not message.text.startswith("Failed to load resource"):
        browsed.errors.append(message.text)


@pytest.fixture
def page(scene: None, gateway: RunningGateway, open_page: Callable[..., Browsed]) -> Browsed:  # noqa: F811
    """The page, with a model to choose."""
    eventually(lambda: gateway.client.get("/health/ready").status_code == 200)
    browsed = open_page(gateway.url)
    browsed.is_ready()
    return browsed
