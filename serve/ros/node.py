"""ROS 2 node: point clouds or images of a topic to a server, its detections to another topic.

    python3 -m serve.ros.node --ros-args -p model:=second -p url:=http://127.0.0.1:8000 -r frames:=/velodyne_points

Needs ROS 2 (rclpy, sensor_msgs, vision_msgs) and ``mmdet3d-serve[gateway]`` in the Python that ROS uses; no torch.
While the server computes, the newest message waits and older ones are dropped.

Parameters: ``url``, ``model``, ``kind`` (cloud, image or compressed), ``score_thr``, ``columns``, ``token_file``,
``track_session`` (ids of tracks in ``id``; empty for none), ``timeout_s``.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.errors import BadRequest, ServeError, SessionNotFound, SettingsError
from serve.ros import detections, messages

__all__ = ["PARAMETERS", "Asker", "answer_all", "frame_of", "main", "read_parameters"]

_QUIET_S = 5.0  # shortest time between two lines of the log from one place
# Messages that come late are at most this much older than the newest; older ones are of a bag that plays again.
_LATE_NS = 10**9
_KINDS = {"cloud": "PointCloud2", "image": "Image", "compressed": "CompressedImage"}

#: Parameters of the node and their defaults, whose types they have.
PARAMETERS: Mapping[str, str | float] = {
    "url": "http://127.0.0.1:8000",
    "model": "second",
    "kind": "cloud",
    "score_thr": 0.3,
    "columns": "",
    "token_file": "",
    "track_session": "",
    "timeout_s": 5.0,
}


def read_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters in the types of their defaults: ROS reads ``score_thr:=1`` as an integer, and so ``model:=7``.

    Raises:
        SettingsError: a value that is none of its parameter.
    """
    found: dict[str, Any] = {}
    for name, default in PARAMETERS.items():
        value = given[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(default, float) and not is_number:
            raise SettingsError(f"parameter {name} must be a number, got {value!r}")
        found[name] = type(default)(value)
    if found["kind"] not in _KINDS:
        raise SettingsError(f"parameter kind must be {', '.join(_KINDS)}, got {found['kind']!r}")
    return found


def frame_of(kind: str, message: Any) -> bytes | NDArray[np.uint8]:
    """Return the frame in a message of `kind` (cloud, image or compressed) as a client takes it.

    Raises:
        UndecodableFrame: the message is none.
    """
    if kind == "cloud":
        return messages.cloud_bytes(message)
    return messages.pixels(message) if kind == "image" else messages.compressed_bytes(message)


class Asker:
    """Asks a server about one message after another, and keeps a track session open.

    Args:
        client: a `serve.client.Client`.
        model: name of the served model.
        options: options of every frame.
        session: name of the track session; empty for none.
        clock: time of messages whose driver sets none, nanoseconds.
    """

    def __init__(
        self,
        client: Any,
        model: str,
        options: Mapping[str, Any],
        session: str = "",
        *,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """See the class."""
        self._client, self._model, self._options, self._session = client, model, dict(options), session
        self._clock = clock
        self._is_open = False
        self._last_ns = -1

    def ask(self, kind: str, message: Any) -> Mapping[str, Any]:
        """Return the answer to a message.

        Raises:
            BadRequest: the message is not after the one before, which tracks need.
            ServeError: the message is no frame, or the server's error.
        """
        frame = frame_of(kind, message)
        if not self._session:
            return self._predict(frame)
        stamp_ns = messages.stamp_ns(message) or self._clock()
        if stamp_ns <= self._last_ns:
            if self._last_ns - stamp_ns < _LATE_NS:
                raise BadRequest(
                    f"a message came twice or late ({(self._last_ns - stamp_ns) / 1e6:g} ms before the newest); it is "
                    "left out"
                )
            self._is_open = False  # a bag that is played again from its start
        self._last_ns = stamp_ns
        track = {"track_session": self._session, "frame_time_s": f"{stamp_ns / 1e9:.9f}"}
        if self._is_open:
            try:
                return self._predict(frame, **track)
            except SessionNotFound:  # the server was restarted, or there was a pause; ids begin at 1
                self._is_open = False
        found = self._predict(frame, **track, track_start=True)
        self._is_open = True
        return found

    def _predict(self, frame: bytes | NDArray[np.uint8], **more: Any) -> Mapping[str, Any]:
        result: Mapping[str, Any] = self._client.predict(frame, self._model, **self._options, **more)
        return result


def answer_all(take: Callable[[], Any], answer: Callable[[Any], None], logger: Any) -> None:
    """Answer one message after another; whatever fails is logged, and the next message has its turn.

    Args:
        take: waits for a message and returns it; None ends the work.
        answer: asks about a message and publishes what was found.
        logger: of the node (`rclpy`).
    """
    while (message := take()) is not None:
        try:
            answer(message)
        except ServeError as error:
            logger.warning(str(error), throttle_duration_sec=_QUIET_S)
        except Exception:  # the thread would end, and the node stay without ever publishing again
            logger.error(
                f"a message was not answered:\n{traceback.format_exc()}", throttle_duration_sec=_QUIET_S
            )


def main() -> None:
    """Run the node until it is shut down."""
    import rclpy
    import sensor_msgs.msg
    import vision_msgs.msg
    from rcl_interfaces.msg import ParameterDescriptor
    from rclpy.executors import ExternalShutdownException
    from rclpy.node import Node
    from rclpy.qos import QoSPresetProfiles

    from serve.client import Client

    class DetectionNode(Node):  # type: ignore[misc]
        """Subscribes to ``frames`` and publishes ``detections``."""

        def __init__(self) -> None:
            super().__init__("mmdet3d_serve")
            any_type = ParameterDescriptor(dynamic_typing=True)
            given = read_parameters(
                {
                    name: self.declare_parameter(name, default, any_type).value
                    for name, default in PARAMETERS.items()
                }
            )
            self.kind = given["kind"]
            token = Path(given["token_file"]).read_text().strip() if given["token_file"] else None
            client = Client(given["url"], token=token, timeout_s=given["timeout_s"])
            options = {"score_thr": given["score_thr"], "columns": given["columns"] or None}
            self.asker = Asker(client, given["model"], options, given["track_session"])
            in_space = self.kind == "cloud"
            self.array = vision_msgs.msg.Detection3DArray if in_space else vision_msgs.msg.Detection2DArray
            detection = vision_msgs.msg.Detection3D if in_space else vision_msgs.msg.Detection2D
            self.make = {"detections": detection, "results": vision_msgs.msg.ObjectHypothesisWithPose}
            self.publisher = self.create_publisher(self.array, "detections", 10)
            self.newest: Any = None
            self.is_stopped = False
            self.arrived = threading.Condition()
            kind = getattr(sensor_msgs.msg, _KINDS[self.kind])
            self.create_subscription(kind, "frames", self.keep, QoSPresetProfiles.SENSOR_DATA.value)
            threading.Thread(
                target=answer_all, args=(self.take, self.answer, self.get_logger()), daemon=True
            ).start()

        def keep(self, message: Any) -> None:
            """Take the newest message in place of one that still waits."""
            with self.arrived:
                self.newest = message
                self.arrived.notify()

        def take(self) -> Any:
            """Wait for a message, and return it; None once the node stops."""
            with self.arrived:
                self.arrived.wait_for(lambda: self.is_stopped or self.newest is not None)
                message, self.newest = self.newest, None
            return None if self.is_stopped else message

        def stop(self) -> None:
            """Take no more messages, and publish none."""
            with self.arrived:
                self.is_stopped = True
                self.arrived.notify()

        def answer(self, message: Any) -> None:
            """Publish the detections of a message."""
            made = detections.detections_3d if self.kind == "cloud" else detections.detections_2d
            found = made(self.asker.ask(self.kind, message))
            array = detections.assign(self.array(), {"detections": found}, self.make)
            array.header = message.header
            for each in array.detections:
                each.header = message.header
            with self.arrived:  # a node that stops has no publisher
                if not self.is_stopped:
                    self.publisher.publish(array)

    rclpy.init()
    node = DetectionNode()
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.stop()
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
