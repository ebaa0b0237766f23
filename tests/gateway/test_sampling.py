"""Frames kept for labelling: which, where and for how long; without the client, and never in a request's way."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.errors import SettingsError, UndecodableFrame
from serve.gateway.backend import Answer
from serve.gateway.batcher import BatchResult
from serve.gateway.models import ModelVersion
from serve.gateway.options import GatewayOptions
from serve.gateway.sampling import FrameSampler, _Folder, open_sampler
from serve.predict.sources import open_source
from serve.protocol.options import FrameOptions
from serve.protocol.worker import EncodedFrame
from serve.storage import s3
from serve.torchserve.management import ModelState
from tests.gateway.conftest import RunningGateway
from tests.gateway.fake_torchserve import CLOUDS, FUSION, IMAGES, FakeTorchServe, answer_for
from tests.gateway.running import eventually
from tests.storage.conftest import account, bucket, nobody, s3_endpoint

__all__ = ["account", "bucket", "nobody", "s3_endpoint"]

STATE = ModelState("second", "1.0", True, (), 0)
ANSWER = b'{"names":["Car"]}'


def options(destination: Any, **more: Any) -> GatewayOptions:
    given = {"sample_share": 1.0, "sample_per_minute": 100, **more}
    return GatewayOptions(sample=str(destination), **given)


def observe(sampler: FrameSampler, body: Any, spec: Any = CLOUDS, **frame: Any) -> None:
    result = BatchResult(Answer(ANSWER), 0.0, 0.0, 1)
    sampler.observe(ModelVersion(STATE, spec=spec), EncodedFrame(body, **frame), result)


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def counts() -> Counter[str]:
    return Counter()


@pytest.fixture
def sampler_to(counts: Counter[str]) -> Iterator[Callable[..., FrameSampler]]:
    made: list[FrameSampler] = []

    def make(destination: Any, **more: Any) -> FrameSampler:
        sampler = open_sampler(options(destination, **more), lambda model, outcome: counts.update([outcome]))
        assert sampler is not None
        made.append(sampler)
        return sampler

    yield make
    for sampler in made:
        sampler.close()


def test_nothing_is_kept_unless_asked_for() -> None:
    assert open_sampler(GatewayOptions(), lambda *_: None) is None


@pytest.mark.parametrize(
    ("body", "spec", "suffix"),
    [
        (b"\0\0\x80?" * 8, CLOUDS, ".bin"),
        (b"\x93NUMPY\x01\x00", CLOUDS, ".npy"),
        (b"# .PCD v0.7\nVERSION 0.7\n", CLOUDS, ".pcd"),
        (b"ply\nformat ascii 1.0\n", CLOUDS, ".ply"),
        (b"LASF" + bytes(200), CLOUDS, ".las"),
        (b"LASF" + bytes(100) + b"\x82" + bytes(99), CLOUDS, ".laz"),
        (b"\xff\xd8\xff\xe0" + bytes(8), IMAGES, ".jpg"),
        (b"\x89PNG\r\n\x1a\n", IMAGES, ".png"),
        (b"II*\x00" + bytes(8), IMAGES, ".tiff"),
        (b"RIFF\0\0\0\0WEBP", IMAGES, ".webp"),
    ],
)  # fmt: skip
def test_a_frame_is_kept_as_sent_under_a_name_that_predict_finds(
    tmp_path: Path, sampler_to: Callable[..., FrameSampler], body: bytes, spec: Any, suffix: str
) -> None:
    sampler = sampler_to(tmp_path)
    observe(sampler, body[:4], spec, rest=[body[4:]], options=FrameOptions(score_thr=0.5))
    sampler.close()
    frame, record = sorted(kept(tmp_path), key=lambda path: path.suffix == ".json")
    assert frame.suffix == suffix and frame.read_bytes() == body and record.stem == frame.stem
    assert frame.parent.parent == tmp_path / "second" / "1.0"
    found = json.loads(record.read_text())
    assert found.pop("time").startswith(frame.parent.name)
    assert found == {
        "model": "second", "version": "1.0", "options": {"score_thr": 0.5}, "answer": json.loads(ANSWER),
    }  # fmt: skip
    (source,) = open_source(frame.parent, spec["modality"])
    assert source.read() == body


def test_a_frame_of_several_parts_is_a_folder_that_predict_finds(
    tmp_path: Path, sampler_to: Callable[..., FrameSampler]
) -> None:
    sampler = sampler_to(tmp_path)
    parts = {"points": b"\0\0\x80?" * 8, "image": b"\x89PNG\r\n", "calibration": b"{}"}
    observe(sampler, parts, FUSION)
    sampler.close()
    (day,) = (tmp_path / "second" / "1.0").iterdir()
    (source,) = open_source(day, "fusion")
    assert source.read() == parts
    assert sorted(path.suffix for path in day.iterdir()) == ["", ".json"]


def test_a_gateway_keeps_frames_and_answers_and_nothing_of_the_client(
    start_gateway: Callable[..., RunningGateway], cloud: Callable[[int], bytes], tmp_path: Path
) -> None:
    gateway = start_gateway(sample=str(tmp_path), sample_share=1.0, api_keys=("secret-key",))
    marks = {
        "x-request-id": "id-of-client",
        "user-agent": "agent-of-client",
        "authorization": "Bearer secret-key",
    }
    answer = gateway.post(content=cloud(0), headers={**marks, "x-forwarded-for": "203.0.113.9"})
    assert answer.content == answer_for(cloud(0), {})
    eventually(lambda: len(kept(tmp_path)) == 2)
    everything = b"".join(path.name.encode() + path.read_bytes() for path in kept(tmp_path))
    for secret in (*marks.values(), "secret-key", "203.0.113.9", "127.0.0.1"):
        assert secret.encode() not in everything
    (record,) = (json.loads(path.read_text()) for path in kept(tmp_path) if path.suffix == ".json")
    assert record["answer"] == answer.json()
    eventually(lambda: 'outcome="kept"} 1.0' in gateway.client.get("/metrics").text)


def test_frames_that_failed_are_not_kept(tmp_path: Path, sampler_to: Callable[..., FrameSampler]) -> None:
    sampler = sampler_to(tmp_path)
    sampler.observe(ModelVersion(STATE, spec=CLOUDS), EncodedFrame(b"odd"), UndecodableFrame("odd"))
    sampler.close()
    assert kept(tmp_path) == []


def test_only_their_owner_reads_kept_frames(tmp_path: Path, sampler_to: Callable[..., FrameSampler]) -> None:
    sampler = sampler_to(tmp_path / "kept")
    observe(sampler, b"\0\0\x80?")
    sampler.close()
    for path in [tmp_path / "kept", *(tmp_path / "kept").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_share_and_rate_bound_what_is_kept(tmp_path: Path, counts: Counter[str]) -> None:
    now = [0.0]
    draws = iter([0.05, 0.5, 0.09, 0.01, 0.02, 0.03])
    destination = _Recorded()
    sampler = FrameSampler(
        destination, options(tmp_path, sample_share=0.1, sample_per_minute=2),
        lambda model, outcome: counts.update([outcome]), clock=lambda: now[0], draw=lambda: next(draws),
    )  # fmt: skip
    for _ in range(4):
        observe(sampler, b"\0\0\x80?")
    now[0] += 30
    observe(sampler, b"\0\0\x80?")  # the third within a minute
    now[0] += 30
    observe(sampler, b"\0\0\x80?")
    sampler.close()
    assert counts == {"kept": 3, "limited": 2} and len(destination.files) == 6


class _Recorded:
    """A destination in memory that can hold its writers."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.fail = False

    def write(self, name: str, data: Any) -> None:
        self.gate.wait()
        if self.fail:
            raise OSError(28, "No space left on device")
        self.files[name] = data

    def list(self) -> Iterator[tuple[str, int]]:
        return iter([(name, len(data)) for name, data in self.files.items()])

    def remove(self, name: str) -> None:
        del self.files[name]


@pytest.mark.parametrize(("size", "most"), [(64, 17), (20 << 20, 3)])
def test_a_slow_destination_drops_frames_and_never_waits(
    tmp_path: Path, counts: Counter[str], size: int, most: int
) -> None:
    destination = _Recorded()
    destination.gate.clear()
    sampler = FrameSampler(destination, options(tmp_path), lambda model, outcome: counts.update([outcome]))
    body = bytes(size)
    for _ in range(40):
        observe(sampler, body)  # returns, though nothing can be written
    assert counts["busy"] >= 40 - most and not destination.files
    destination.gate.set()
    sampler.close()
    assert counts["kept"] == 40 - counts["busy"] > 0
    assert sampler._waiting_bytes == 0


def test_a_destination_that_fails_is_counted_and_logged_once_in_a_while(
    tmp_path: Path, counts: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    destination = _Recorded()
    destination.fail = True
    sampler = FrameSampler(destination, options(tmp_path), lambda model, outcome: counts.update([outcome]))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            observe(sampler, b"\0\0\x80?")
        sampler.close()
    assert counts == {"failed": 3} and len(caplog.records) == 1


def test_a_frame_whose_record_cannot_be_written_is_not_kept_either(
    tmp_path: Path, counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = _Recorded()
    write = destination.write

    def write_frames_only(name: str, data: Any) -> None:
        destination.fail = name.endswith(".json") and "calibration" not in name
        write(name, data)

    monkeypatch.setattr(destination, "write", write_frames_only)
    sampler = FrameSampler(destination, options(tmp_path), lambda model, outcome: counts.update([outcome]))
    observe(sampler, b"\0\0\x80?")
    observe(sampler, {"points": b"\0\0\x80?", "image": b"\x89PNG", "calibration": b"{}"}, FUSION)
    sampler.close()
    assert counts == {"failed": 2} and not destination.files


def test_old_frames_and_those_beyond_the_bytes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    destination = _Recorded()
    names = [
        "second/1.0/2020-01-01/000000-000-00000000.bin", "second/1.0/2020-01-01/000000-000-00000000.json",
        "second/1.0/2099-01-01/000000-000-00000000.bin", "second/1.0/2099-01-01/000001-000-00000000/points.bin",
        "second/1.0/2099-01-02/000000-000-00000000.bin",
    ]  # fmt: skip
    others = [
        "readme.txt", "second/1.0/2020-01-01/mine.bin", "2020-01-01/000000-000-00000000.bin",
        "second/1.0/2020-01-01/000000-000-00000000.txt", "second/x/2020-01-01/000000-000-00000000.bin",
    ]  # fmt: skip
    destination.files = {name: bytes(100) for name in (*names, *others)}
    sampler = FrameSampler(destination, options(tmp_path, sample_bytes=200), lambda *_: None)
    sampler.close()
    assert [*destination.files] == [names[3], names[4], *others]


def test_frames_are_removed_on_the_hour_that_they_are_too_old(tmp_path: Path) -> None:
    destination = _Recorded()
    now = datetime.now(UTC)
    names = [
        f"second/1.0/{now - timedelta(hours=hours):%Y-%m-%d/%H%M%S}-000-00000000.bin" for hours in (13, 11)
    ]
    half = "second/1.0/2020-01-01/.000000-000-00000000.bin.part"  # of a process that was killed
    destination.files = dict.fromkeys((*names, half), b"x")
    FrameSampler(destination, options(tmp_path, sample_days=0.5), lambda *_: None).close()
    assert [*destination.files] == [names[1]]


def test_a_file_that_vanishes_while_they_are_listed_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x")
    gone = tmp_path / "gone"
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter([tmp_path / "a", gone, tmp_path / "b"]))
    assert [*_Folder(tmp_path).list()] == [("a", 1), ("b", 1)]


@pytest.mark.parametrize(
    ("state", "parts"),
    [
        (ModelState("..", "1.0", True, (), 0), {"points": b"p", "image": b"i"}),
        (ModelState("second", "..", True, (), 0), {"points": b"p", "image": b"i"}),
        (STATE, {"points": b"p", "sweep./../../../../outside": b"s"}),
    ],
)
def test_a_name_that_leads_elsewhere_is_not_written(
    tmp_path: Path,
    counts: Counter[str],
    sampler_to: Callable[..., FrameSampler],
    state: ModelState,
    parts: Any,
) -> None:
    sampler = sampler_to(tmp_path / "kept")
    result = BatchResult(Answer(ANSWER), 0.0, 0.0, 1)
    sampler.observe(ModelVersion(state, spec=FUSION), EncodedFrame(parts), result)
    sampler.close()
    assert counts == {"failed": 1}
    assert not [path for path in kept(tmp_path) if "outside" in path.name or path.parent == tmp_path]
    assert [path for path in kept(tmp_path) if path.suffix == ".json"] == []


def test_a_folder_that_is_empty_after_its_frames_were_removed_goes_too(
    tmp_path: Path, sampler_to: Callable[..., FrameSampler]
) -> None:
    old = tmp_path / "second" / "1.0" / "2020-01-01" / "000000-000-00000000.bin"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"x")
    sampler_to(tmp_path).close()
    assert tmp_path.is_dir() and not [*tmp_path.iterdir()]


def test_frames_in_a_bucket_are_found_again_and_removed_when_they_are_old(
    bucket: str, sampler_to: Callable[..., FrameSampler], counts: Counter[str]
) -> None:
    client = s3.connect().client
    old = "kept/second/1.0/2020-01-01/000000-000-00000000.bin"
    client.put_object(Bucket=bucket, Key=old, Body=b"x")
    client.put_object(Bucket=bucket, Key="kept/mine.bin", Body=b"x")
    sampler = sampler_to(f"s3://{bucket}/kept")
    observe(sampler, b"\0\0\x80?" * 4)
    sampler.close()
    assert counts == {"kept": 1}
    found = sorted(entry["Key"] for entry in client.list_objects_v2(Bucket=bucket)["Contents"])
    assert len(found) == 3 and old not in found and "kept/mine.bin" in found
    day = next(key for key in found if key.endswith(".json")).rsplit("/", 1)[0]
    (frame,) = open_source(f"s3://{bucket}/{day}", "lidar")
    assert frame.read() == b"\0\0\x80?" * 4


def test_a_long_view_of_a_request_is_kept_in_a_bucket_and_lets_go_of_its_request(
    bucket: str, sampler_to: Callable[..., FrameSampler], counts: Counter[str]
) -> None:
    whole = bytearray(np.random.default_rng(0).bytes(9 << 20))  # longer than a part of an upload
    view = memoryview(whole)[4:]
    sampler = sampler_to(f"s3://{bucket}/kept")
    observe(sampler, {"points": view, "image": b"\x89PNG", "calibration": b"{}"}, FUSION)
    sampler._copies.shutdown()
    view.release()
    whole.clear()  # an error while anybody has a view of it
    sampler.close()
    assert counts == {"kept": 1}
    (key,) = (
        entry["Key"]
        for entry in s3.connect().client.list_objects_v2(Bucket=bucket)["Contents"]
        if entry["Key"].endswith("points.bin")
    )
    kept_points = s3.connect().client.get_object(Bucket=bucket, Key=key)["Body"].read()
    assert kept_points == np.random.default_rng(0).bytes(9 << 20)[4:]


@pytest.mark.parametrize("place", ["https://example.com/x", "/proc/kept", "lmdb:///tmp/x"])
def test_a_place_that_takes_no_frames_stops_the_start(place: str) -> None:
    with pytest.raises(SettingsError):
        open_sampler(options(place), lambda *_: None)


def test_torchserve_is_never_asked_for_a_sample(
    start_gateway: Callable[..., RunningGateway], torchserve: FakeTorchServe, cloud: Callable[[int], bytes],
    tmp_path: Path,
) -> None:  # fmt: skip
    gateway = start_gateway(sample=str(tmp_path), sample_share=1.0)
    gateway.post(content=cloud(0))
    eventually(lambda: len(kept(tmp_path)) == 2)
    assert len(torchserve.calls) == 1
