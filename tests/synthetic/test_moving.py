"""The moving scene: the same on every call, objects that keep apart, and one that is hidden for a while."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from serve.synthetic.moving import FRAMES, MOVERS, RATE, MovingFrame, generate_sequence, true_boxes
from serve.synthetic.scenes import CLASSES

CYCLIST = next(k for k, mover in enumerate(MOVERS) if mover.name.startswith("cyclist"))


@pytest.fixture(scope="module")
def frames() -> list[MovingFrame]:
    return list(islice(generate_sequence(), 24))


def test_the_sequence_is_the_same_on_every_call(frames: list[MovingFrame]) -> None:
    for one, other in zip(frames, generate_sequence(2), strict=False):
        assert one.scene.to_bytes() == other.scene.to_bytes() and one.ids.tolist() == other.ids.tolist()


def test_boxes_are_those_of_the_script(frames: list[MovingFrame]) -> None:
    for number, frame in enumerate(frames):
        assert frame.time_s == number / RATE
        np.testing.assert_allclose(frame.scene.boxes, true_boxes(frame.time_s)[frame.ids], atol=1e-4)
        assert frame.scene.labels.tolist() == [MOVERS[k].label for k in frame.ids]


def test_the_cyclist_is_hidden_behind_the_van_and_comes_out(frames: list[MovingFrame]) -> None:
    counts = [int(frame.scene.points_in_box[frame.ids == CYCLIST].sum()) for frame in frames]
    hidden = [k for k, count in enumerate(counts) if count < 5]
    assert 2 <= len(hidden) <= 8 and hidden == list(range(hidden[0], hidden[-1] + 1))
    assert counts[0] > 20 and counts[-1] > 20


def test_nothing_touches_anything_else() -> None:
    """Discs around halves of each object, as long as wide, keep apart."""
    for number in range(FRAMES):
        boxes = true_boxes(number / RATE)
        parts = []
        for who, (x, y, _, length, width, _, yaw) in enumerate(boxes.tolist()):
            steps = max(1, round(length / width))
            for k in range(steps):
                along = (k + 0.5) * length / steps - length / 2
                parts.append((who, x + along * np.cos(yaw), y + along * np.sin(yaw), width / 2))
        who, x, y, radius = np.array(parts).T
        apart = np.hypot(x[:, None] - x, y[:, None] - y) - radius[:, None] - radius
        assert apart[who[:, None] != who].min() > 0, number


def test_every_class_is_there() -> None:
    assert {mover.label for mover in MOVERS} == set(range(len(CLASSES)))
