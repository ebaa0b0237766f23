"""What the node asks a server, without ROS: frames of messages, and a track session that stays open."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from serve.client import Client
from serve.errors import BadRequest, Overloaded, SettingsError, UndecodableFrame
from serve.ros.node import PARAMETERS, Asker, answer_all, frame_of, read_parameters
from tests.ros.test_messages import PICTURE, altered, image, velodyne
from tests.ros.test_messages import cloud as cloud_message


def at(seconds: float) -> Any:
    message = cloud_message(velodyne())
    message.header.stamp.sec, message.header.stamp.nanosec = int(seconds), round(seconds % 1 * 1e9)
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


@pytest.mark.parametrize("late", [2.0, 1.9])
def test_a_message_that_comes_twice_or_late_is_left_out_and_ids_go_on(client: Any, late: float) -> None:
    asker = Asker(client, "second", {}, "lidar")
    first = asker.ask("cloud", at(1))
    asker.ask("cloud", at(2))
    with pytest.raises(BadRequest):
        asker.ask("cloud", at(late))
    third = asker.ask("cloud", at(2.1))
    assert (third["track_frame"], third["track_ids"]) == (2, first["track_ids"])


def test_messages_without_a_time_have_that_of_their_arrival(client: Any) -> None:
    clock = iter(range(10**18, 2 * 10**18, 10**8))
    asker = Asker(client, "second", {}, "lidar", clock=lambda: next(clock))
    assert [asker.ask("cloud", at(0))["track_frame"] for _ in range(3)] == [0, 1, 2]


def test_parameters_have_the_types_of_their_defaults() -> None:
    assert read_parameters(PARAMETERS) == PARAMETERS
    found = read_parameters({**PARAMETERS, "score_thr": 1, "model": 7, "timeout_s": 5})
    assert (found["score_thr"], found["model"], found["timeout_s"]) == (1.0, "7", 5.0)
    for wrong in ({"kind": "depth"}, {"score_thr": "high"}, {"timeout_s": True}):
        with pytest.raises(SettingsError):
            read_parameters({**PARAMETERS, **wrong})


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
