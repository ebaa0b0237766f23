"""Two runs into one destination: one writes, the other waits; a run that is gone is replaced, one that is late ends."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import orjson
import pytest

from serve import storage
from serve.bulk import lock, retry
from serve.bulk.destination import Destination
from serve.bulk.lock import BucketLock, hold_destination
from serve.bulk.parts import Job
from serve.bulk.run import BulkRun, plan_run
from serve.errors import StorageError
from serve.predict.sources import Source, open_source
from serve.protocol.options import FrameOptions
from serve.storage import s3
from tests.bulk import fake
from tests.bulk.test_run import run
from tests.gateway.running import eventually
from tests.storage import servers

BUCKET = "locks"
OUT = f"s3://{BUCKET}/out"
URI = f"{OUT}/bulk.json.lock"


@pytest.fixture(scope="module")
def proxy() -> Iterator[servers.Proxy]:
    with (
        servers.moto() as endpoint,
        servers.proxy_to(endpoint) as made,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in (
            ("AWS_ENDPOINT_URL", made.endpoint),
            ("AWS_ACCESS_KEY_ID", "x"),
            ("AWS_SECRET_ACCESS_KEY", "y"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            patch.setenv(name, value)
        s3._CONNECTED.clear()
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield made
        s3._CONNECTED.clear()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_RENEW_S", 0.05), ("_LOOK_S", 0.02), ("_SETTLE_S", 0.0)):
        monkeypatch.setattr(lock, name, seconds)


def leave_lock(**holder: Any) -> None:
    """Leave the lock of a run that was killed."""
    storage.write_bytes(URI, orjson.dumps({**lock._this_process(), **holder}))


def ended_process() -> int:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize("in_bucket", [False, True])
def test_a_second_run_waits_until_the_first_one_ends(
    in_bucket: bool, proxy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where, taken = OUT if in_bucket else str(tmp_path / "out"), threading.Event()

    def begin() -> None:
        with ExitStack() as stack:
            hold_destination(Destination(where), stack)
            taken.set()

    with ExitStack() as stack:
        hold_destination(Destination(where), stack)
        thread = threading.Thread(target=begin)
        thread.start()
        eventually(lambda: capsys.readouterr().err, 10)  # a line that says so
        assert not taken.is_set()
    thread.join(10)
    assert taken.is_set()
    assert not (storage.exists(URI) if in_bucket else (tmp_path / "out" / "bulk.json.lock").exists())


def test_one_of_many_gets_the_lock(proxy: Any) -> None:
    locks = [BucketLock(URI) for _ in range(4)]
    gate, got = threading.Barrier(4), list[bool]()

    def take(each: BucketLock) -> None:
        gate.wait()
        got.append(each._take())

    threads = [threading.Thread(target=take, args=(each,)) for each in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False, False, False, True]
    s3.connect().remove(storage.parse(URI))


def test_the_lock_of_a_process_that_is_gone_is_taken_over_at_once(proxy: Any) -> None:
    leave_lock(process=ended_process())
    with BucketLock(URI) as held:
        held.check()
    assert not storage.exists(URI)


def test_the_lock_of_another_machine_is_taken_over_when_it_was_silent(
    proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_lock(process=ended_process(), boot="another")
    assert not BucketLock(URI)._take()
    monkeypatch.setattr(lock, "_STALE_S", 0.0)
    with BucketLock(URI):
        pass
    assert not storage.exists(URI)


def test_a_run_whose_lock_was_taken_over_ends_and_leaves_it(proxy: Any, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    for k in range(6):
        (tmp_path / "frames" / f"{k}.bin").write_bytes(b"x")
    seen: list[int] = []

    def take_over(frames: int) -> None:
        if not seen:
            leave_lock(token="another")
            eventually(lambda: "lock" not in {each.name for each in threading.enumerate()}, 10)
        seen.append(frames)

    with pytest.raises(StorageError):
        run(tmp_path / "frames", OUT, engine=fake.OneProcess(), part_frames=1, advance=take_over)
    assert len(seen) == 1 and b"another" in storage.read_bytes(URI)
    assert len(Destination(OUT).finished()) == 1 and not storage.exists(f"{OUT}/summary.json")
    s3.connect().remove(storage.parse(URI))


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_write_whose_answer_was_lost_is_the_runs_own(
    is_refused: bool, proxy: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_if, lost = s3.S3.write_if, list[str]()

    def lose(self: s3.S3, where: Any, data: bytes, etag: str) -> str | None:
        written = write_if(self, where, data, etag)
        if written is None or len(lost) == 3:
            return written
        lost.append(etag)
        if is_refused:  # repeated by the client, and then its condition does not hold any more
            return None
        raise StorageError("no answer")

    monkeypatch.setattr(s3.S3, "write_if", lose)
    monkeypatch.setattr(retry, "_WRITE_PAUSES_S", (0.01,))
    with BucketLock(URI) as held:
        eventually(lambda: len(lost) == 3 and held._renewals > 6, 10)
        held.check()
        assert not capsys.readouterr().err
    assert lost[0] == "" and lost[1] and not storage.exists(URI)


def test_a_lock_that_is_lost_while_frames_are_listed_ends_the_run_before_it_writes(
    proxy: Any, tmp_path: Path
) -> None:
    (tmp_path / "0.bin").write_bytes(b"x")
    out = f"s3://{BUCKET}/slow"

    def list_slowly() -> Source:
        storage.write_bytes(f"{out}/bulk.json.lock", orjson.dumps({"token": "another"}))
        eventually(lambda: "lock" not in {each.name for each in threading.enumerate()}, 10)
        return open_source(tmp_path, "lidar")

    task = BulkRun(Job("model.mar", False, FrameOptions(), 2, fake.open_echo), {"model": "one"}, 1)
    with ExitStack() as stack, pytest.raises(StorageError):
        plan_run(task, Destination(out), list_slowly, stack, overwrite=False)
    assert storage.list_files(out) == [f"{out}/bulk.json.lock"]


def test_a_server_without_conditions_is_named_and_its_lock_still_seen(
    proxy: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_if = s3.S3.write_if

    def unconditional(self: s3.S3, where: Any, data: bytes, etag: str) -> str | None:
        self.write(where, data)
        return self.head(where).etag

    monkeypatch.setattr(s3.S3, "write_if", unconditional)
    with BucketLock(URI) as held:
        assert capsys.readouterr().err
        assert not BucketLock(URI)._take()
        held.check()
    assert not storage.exists(URI)
    monkeypatch.setattr(s3.S3, "write_if", write_if)
    proxy.spoil = lambda method, path, headers: 501 if {"if-match", "if-none-match"} & set(headers) else None
    try:
        with BucketLock(URI):
            assert storage.exists(URI)
    finally:
        proxy.spoil = lambda method, path, headers: None


def test_a_bucket_that_cannot_be_written_is_an_error_before_frames_are_listed(
    proxy: Any, tmp_path: Path
) -> None:
    (tmp_path / "0.bin").write_bytes(b"x")
    proxy.spoil = lambda method, path, headers: 403 if method == "PUT" else None
    try:
        with pytest.raises(StorageError):
            run(tmp_path, f"{OUT}-denied", engine=fake.OneProcess())
    finally:
        proxy.spoil = lambda method, path, headers: None
    assert not storage.exists(f"{OUT}-denied")
