"""Predictions through a server: the gateway over HTTP in front of the fake TorchServe, and TorchServe's own port."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from serve.errors import BackendBroken, ModelNotFound, NotReady, ServeError
from serve.predict import connect, open_source, predict
from serve.predict.run import Run, run
from serve.protocol.options import FrameOptions
from tests.conftest import ROOT, accept_ctrl_c
from tests.gateway.conftest import RunningGateway
from tests.gateway.fake_torchserve import IMAGES, FakeModel, FakeTorchServe
from tests.gateway.running import eventually


@pytest.fixture
def frames(tmp_path: Path, cloud: Callable[[int], bytes]) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    for k in range(5):
        (folder / f"{k}.bin").write_bytes(cloud(k))
    return folder


@pytest.fixture
def cloud() -> Callable[[int], bytes]:
    def make(number: int) -> bytes:
        return np.random.default_rng(number).normal(size=(16, 4)).astype(np.float32).tobytes()

    return make


@pytest.mark.parametrize("connections", [1, 3])
def test_answers_of_the_gateway_are_kept_byte_for_byte_and_in_order(
    gateway: RunningGateway, frames: Path, connections: int
) -> None:
    with connect(gateway.url, "second", connections=connections) as model:
        assert (model.modality, model.load_dim) == ("lidar", 4)
        found = list(predict(frames, model, score_thr=0.25, batch_size=connections))
    assert [each.frame.name for each in found] == [f"{k}.bin" for k in range(5)]
    for each in found:
        body = (frames / each.frame.name).read_bytes()
        assert each.encoded == gateway.post(content=body, headers={"X-Score-Thr": "0.25"}).content
        assert each.answer == orjson.loads(each.encoded)


def test_a_run_through_the_gateway_records_who_answered(
    gateway: RunningGateway, frames: Path, tmp_path: Path
) -> None:
    with connect(gateway.url, "second", connections=2) as model:
        summary = run(
            Run(open_source(frames, model.modality), model, tmp_path / "out", ("json",), batch_size=2)
        )
    assert summary.predicted == 5
    described = orjson.loads((tmp_path / "out" / "run.json").read_bytes())
    assert described["predictions"]["model"] == {"url": gateway.url, "name": "second", "version": "1.0"}


def test_a_frame_that_the_server_rejects_fails_alone(
    start_gateway: Callable[..., RunningGateway], frames: Path
) -> None:
    (frames / "2.bin").write_bytes(bytes(1600))
    with connect(start_gateway(max_frame_bytes=1000).url, "second") as model:
        found = list(predict(frames, model))
    assert [each.error is None for each in found] == [True, True, False, True, True]
    assert orjson.loads(found[2].encoded)["error"]["code"] == "frame_too_large"


def test_a_model_that_the_gateway_lacks_is_an_error_at_once(gateway: RunningGateway) -> None:
    with pytest.raises(ModelNotFound):
        connect(gateway.url, "third")
    with pytest.raises(ModelNotFound):
        connect(gateway.url, "second", "7.0")


def test_nothing_at_the_address_is_an_error_at_once(free_ports: Callable[[int], list[int]]) -> None:
    with pytest.raises(NotReady):
        connect(f"http://127.0.0.1:{free_ports(1)[0]}", "second")


def test_images_of_a_video_travel_as_png(
    start_gateway: Callable[..., RunningGateway], torchserve: FakeTorchServe, drive: Path
) -> None:
    torchserve.models["pictures"] = {"1.0": FakeModel(dict(IMAGES))}
    with connect(start_gateway().url, "pictures") as model:
        assert model.modality == "image"
        list(predict(drive, model))
    sent = [frame for call in torchserve.calls for frame in call]
    assert len(sent) == 6 and all(frame.startswith(b"\x89PNG") for frame in sent)


def test_a_server_that_goes_away_ends_the_run_which_goes_on_later(
    gateway: RunningGateway, backend: Any, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def task(model: Any) -> Run:
        return Run(open_source(frames, model.modality), model, tmp_path / "out", ("json",), FrameOptions())

    done: list[str] = []

    def go(prediction: Any) -> None:
        done.append(prediction.frame.name)
        if len(done) == 2:
            backend.go()

    # Only the run gives up at once: connecting waits for the gateway to have met its model.
    with connect(gateway.url, "second") as model, monkeypatch.context() as hurried:
        hurried.setattr("serve.predict.models._RETRIES_S", (0.01,))
        with pytest.raises(ServeError) as raised:
            run(task(model), progress=go)
    assert isinstance(raised.value, NotReady | BackendBroken)
    assert 2 <= len(done) < 5
    backend.come_back()
    with connect(gateway.url, "second") as model:
        summary = run(task(model))
    assert summary.kept == len(done) and summary.predicted == 5 - len(done)


def test_lines_on_standard_output_name_the_frames(gateway: RunningGateway, frames: Path) -> None:
    output = io.BytesIO()
    with connect(gateway.url, "second") as model:
        run(Run(open_source(frames, model.modality), model, None, ("jsonl",)), output=output)
    lines = [orjson.loads(line) for line in output.getvalue().splitlines()]
    assert [line["frame"] for line in lines] == [f"{k}.bin" for k in range(5)]


# The command as a process, stopped in the middle: the backend holds the fourth frame.


class Command:
    """``mmdet3d-serve predict``, with Ctrl-C switched on."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serve", "predict", *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=accept_ctrl_c,
        )

    def end(self) -> tuple[int, str]:
        _, text = self.process.communicate(timeout=60)
        return self.process.returncode, text.decode()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_ended_goes_on_with_what_is_missing(
    gateway: RunningGateway,
    backend: Any,
    torchserve: FakeTorchServe,
    cloud: Callable[[int], bytes],
    frames: Path,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    out = tmp_path / "out"
    arguments = (frames, "--model", "second", "--url", gateway.url, "--out", out, "--format", "json,csv")
    backend.hold(cloud(3))
    first = Command(*arguments)
    part = out / ".predictions.jsonl.part"
    eventually(lambda: part.exists() and part.read_bytes().count(b"\n") == 3, timeout_s=60)
    first.process.send_signal(number)
    code, text = first.end()
    assert code == (-number if number == signal.SIGKILL else 130)
    assert "Traceback" not in text
    assert ("3 of 5 frames are finished" in text) == (number != signal.SIGKILL)
    assert sorted(path.name for path in out.iterdir()) == [part.name, "json", "run.json"]
    backend.release()
    sent = len(torchserve.calls)
    code, text = Command(*arguments).end()
    assert code == 0, text
    assert "2 frames predicted, 3 kept from before" in text
    assert sum(len(call) for call in torchserve.calls[sent:]) == 2
    lines = [orjson.loads(line) for line in (out / "predictions.jsonl").read_bytes().splitlines()]
    assert [line["frame"] for line in lines] == [f"{k}.bin" for k in range(5)]
    assert sorted(path.name for path in (out / "json").iterdir()) == [f"{k}.json" for k in range(5)]
    assert not list(out.glob(".*"))
    code, text = Command(*arguments).end()
    assert (code, len(torchserve.calls[sent:])) == (0, 2) and "5 kept from before" in text
