"""gRPC with several gateway processes on one port (`--gateways`), seen from outside."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

triton = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
pytest.importorskip("grpc", reason="needs the extra grpc")

from tritonclient.utils import InferenceServerException  # noqa: E402

from tests.gateway.fake_torchserve import answer_for  # noqa: E402
from tests.gateway.grpc.test_infer import points  # noqa: E402
from tests.gateway.running import eventually  # noqa: E402
from tests.gateway.test_processes import gateways, get  # noqa: E402

pytestmark = pytest.mark.slow

# A connection of its own for each client, which the kernel hands to one of the processes.
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


@dataclass
class Stream:
    """A client with an open stream, and what it brought."""

    client: Any
    process: str  # label of the process that has it
    brought: queue.Queue[tuple[Any, Any]] = field(default_factory=queue.Queue)

    def send(self, cloud: bytes, number: int) -> None:
        self.client.async_stream_infer("second", [points(cloud)], request_id=str(number))

    def next(self) -> tuple[Any, Any]:
        return self.brought.get(timeout=20)

    def answer(self) -> tuple[str, str]:
        """The next result: its id and the frame that it is about."""
        result, error = self.next()
        assert error is None, error
        return result.get_response().id, json.loads(result.as_numpy("detections")[0])["frame"]


def expected(cloud: bytes, number: int) -> tuple[str, str]:
    return str(number), json.loads(answer_for(cloud, {}))["frame"]


def streams_by_process(url: str) -> dict[str, float]:
    found = re.findall(
        r'^mmdet3d_serve_grpc_streams\{gateway="(\d)"\} (\S+)$', get(url, "/metrics").text, re.M
    )
    return {process: float(count) for process, count in found}


@dataclass
class Group:
    """Two processes with both ports."""

    url: str
    address: str
    process: subprocess.Popen[str]
    stack: ExitStack

    def client(self) -> Any:
        return self.stack.enter_context(
            triton.InferenceServerClient(self.address, channel_args=OWN_CONNECTION)
        )

    def open_streams(self, cloud: bytes) -> list[Stream]:
        """Open streams until each process has one at least; each has answered a frame."""
        opened: list[Stream] = []
        before = streams_by_process(self.url)
        while {stream.process for stream in opened} != {"0", "1"}:
            assert len(opened) < 20
            stream = Stream(self.client(), "")
            stream.client.start_stream(lambda result, error, to=stream.brought: to.put((result, error)))
            stream.send(cloud, 0)
            assert stream.answer() == expected(cloud, 0)
            now = streams_by_process(self.url)
            (stream.process,) = [process for process in now if now[process] > before[process]]
            before = now
            opened.append(stream)
        return opened


@contextmanager
def grpc_gateways(backend: Any, *flags: str) -> Iterator[Group]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        gateways(backend, "--grpc-port", str(port), *flags) as (url, process),
        ExitStack() as stack,
    ):
        yield Group(url, f"127.0.0.1:{port}", process, stack)


def test_calls_spread_over_the_processes_and_streams_stay_in_theirs(backend, cloud):
    with grpc_gateways(backend) as group:
        for number in range(24):
            result = group.client().infer("second", [points(cloud(number))])
            assert json.loads(result.as_numpy("detections")[0])["frame"] == expected(cloud(number), 0)[1]
        text = get(group.url, "/metrics").text
        calls = re.findall(
            r'^mmdet3d_serve_grpc_calls_total\{gateway="(\d)",method="ModelInfer".* (\S+)$', text, re.M
        )
        assert {process for process, _ in calls} == {"0", "1"}
        assert sum(float(count) for _, count in calls) == 24 and min(float(count) for _, count in calls) >= 3
        streams = group.open_streams(cloud(0))
        for number in range(1, 20):
            for stream in streams:
                stream.send(cloud(number), number)
        for number in range(1, 20):
            assert [stream.answer() for stream in streams] == [expected(cloud(number), number)] * len(streams)


def test_sigterm_answers_what_the_streams_of_all_processes_have_sent(backend, torchserve, cloud):
    with grpc_gateways(backend) as group:
        streams = group.open_streams(cloud(0))
        backend.hold()
        for stream in streams:
            stream.send(cloud(1), 1)
        eventually(lambda: pending(group.url) == len(streams))
        group.process.send_signal(signal.SIGTERM)
        backend.release()
        for stream in streams:
            assert stream.answer() == expected(cloud(1), 1)
            assert stream.next()[1].status() == "StatusCode.UNAVAILABLE"
        assert group.process.wait(20) == 0


def test_killed_process_ends_its_streams_and_no_others(backend, cloud):
    with grpc_gateways(backend) as group:
        streams = group.open_streams(cloud(0))
        os.kill(min(child.pid for child in psutil.Process(group.process.pid).children()), signal.SIGKILL)
        lost = [stream for stream in streams if ends(stream, cloud(1))]
        kept = [stream for stream in streams if stream not in lost]
        assert lost and kept and not {s.process for s in lost} & {s.process for s in kept}
        again = Stream(lost[0].client, "")
        lost[0].client.stop_stream()
        again.client.start_stream(lambda result, error: again.brought.put((result, error)))
        again.send(cloud(2), 2)  # gRPC connects anew, to the process that is left or to its successor
        assert again.answer() == expected(cloud(2), 2)
        eventually(lambda: len(streams_by_process(group.url)) == 2, 20.0)


def ends(stream: Stream, cloud: bytes) -> bool:
    """Send one more frame; whether the stream has ended as a client that may try again expects it."""
    # Raised if the client has noticed the end, whose error the callback has.
    with suppress(InferenceServerException):
        stream.send(cloud, 1)
    result, error = stream.next()
    if error is None:
        assert result.get_response().id == "1"
        return False
    assert error.status() == "StatusCode.UNAVAILABLE"
    return True


def pending(url: str) -> float:
    found = re.findall(r"^mmdet3d_serve_pending_frames\{.*\} (\S+)$", get(url, "/metrics").text, re.M)
    return sum(map(float, found))
