"""What the node asks a server, without ROS: frames of messages, and a track session that stays open."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from serve.client import Client
from serve.errors import Overloaded, UndecodableFrame
from serve.ros.node import Asker, answer_all, frame_of
from tests.ros.test_messages import PICTURE, altered, image, velodyne
from tests.ros.test_messages import cloud as cloud_message


def at(seconds: int) -> Any:
    message = cloud_message(velodyne())
    message.header.stamp.sec, message.header.stamp.nanosec = seconds, 0
    return message


@pytest.fixture
def client(gateway: Any) -> Any:
    with Client(gateway.url) as made:
        yield made


def test_a_message_is_answered(client: Any) -> None:
    answer = Asker(client, "second", {"score_thr": 0.3}).ask("cloud", at(1))
    assert answer["names"] and "track_ids" not in answer


def test_a_session_is_opened_and_continued(client: Any) -> None:
    asker = Asker(client, "second", {}, "lidar")
    assert [asker.ask("cloud", at(second))["track_frame"] for second in (1, 2, 3)] == [0, 1, 2]


def test_a_session_that_the_server_lost_is_opened_again(client: Any) -> None:
    asker = Asker(client, "second", {}, "lidar")
    asker.ask("cloud", at(1))
    client.predict(frame_of("cloud", at(2)), "second", track_session="lidar", frame_time_s=2, track_end=True)
    assert asker.ask("cloud", at(3))["track_frame"] == 0


def test_a_bag_that_is_played_again_opens_the_session_again(client: Any) -> None:
    asker = Asker(client, "second", {}, "lidar")
    assert [asker.ask("cloud", at(second))["track_frame"] for second in (1, 2, 1, 2)] == [0, 1, 0, 1]


class Logger:
    """What a node logs, by level."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def warning(self, text: str, **throttle: float) -> None:
        self.lines.append(("warning", text))

    def error(self, text: str, **throttle: float) -> None:
        self.lines.append(("error", text))


def test_a_message_that_fails_in_any_way_is_logged_and_the_next_one_answered() -> None:
    messages = iter(["busy", "broken", "good", None])
    answered = []

    def answer(message: str) -> None:
        if message == "busy":
            raise Overloaded("the queue is full")
        if message == "broken":
            raise AssertionError("expected a uint8")
        answered.append(message)

    logger = Logger()
    answer_all(lambda: next(messages), answer, logger)
    assert answered == ["good"]
    assert [level for level, _ in logger.lines] == ["warning", "error"]
    assert "AssertionError: expected a uint8" in logger.lines[1][1]


def test_images_are_read_by_kind() -> None:
    np.testing.assert_array_equal(frame_of("image", image(PICTURE, "bgr8")), PICTURE)
    with pytest.raises(UndecodableFrame):
        frame_of("image", altered(image(PICTURE, "bgr8"), encoding="32FC1"))


def test_the_node_imports_without_ros_and_torch() -> None:
    code = "import serve.ros.node, sys; sys.exit(bool({'torch', 'rclpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
