"""Buckets that fail for a time, keys that vanish, an interrupt: recorded, repeated or a clear end; nothing is lost."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import psutil
import pytest

from serve.bulk import retry
from serve.bulk.destination import Destination
from serve.bulk.listing import list_frames
from serve.bulk.parts import Job, manifest_line, predict_part
from serve.bulk.processes import LocalEngine
from serve.bulk.retry import SourceGone
from serve.bulk.run import BulkRun, execute, plan_run
from serve.cli import bulk
from serve.errors import ServeError, StorageError
from serve.predict.frames import Clip
from serve.predict.sources import frame_at, open_source
from serve.protocol.options import FrameOptions
from serve.storage import download, s3
from tests.bulk import fake
from tests.bulk.test_run import lines, run
from tests.conftest import ROOT
from tests.gateway.running import eventually
from tests.storage import servers

JOB = Job("m", False, FrameOptions(), 2, fake.open_echo)
BUCKET = "frames"


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with servers.moto() as endpoint:
        yield endpoint


@pytest.fixture
def proxy(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Proxy]:
    """A bucket with four frames, behind a proxy that can spoil answers."""
    with servers.proxy_to(moto) as made:
        for name, value in (
            ("AWS_ENDPOINT_URL", made.endpoint),
            ("AWS_ACCESS_KEY_ID", "x"),
            ("AWS_SECRET_ACCESS_KEY", "y"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(retry, "_WRITE_PAUSES_S", (0.01, 0.01))
        monkeypatch.setattr(retry, "_READ_PAUSES_S", (0.01,))
        monkeypatch.setattr(s3, "_DEFAULT", s3.Options(attempts=1))
        s3._CONNECTED.clear()
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        for k in range(4):
            client.put_object(Bucket=BUCKET, Key=f"drive/{k}.bin", Body=b"x" * 16 * (k + 1))
        yield made
        s3._CONNECTED.clear()


def manifest() -> list[bytes]:
    return [manifest_line(frame) for frame in list_frames(f"s3://{BUCKET}/drive", "lidar")]


def codes(found: bytes) -> list[str | None]:
    return [json.loads(line).get("error", {}).get("code") for line in found.splitlines()]


def predict(entries: list[bytes], path: Path) -> list[str | None]:
    with path.open("wb") as out:
        predict_part(fake.BulkModel(), JOB, entries, out)
    return codes(path.read_bytes())


def test_keys_that_vanish_and_objects_that_cannot_be_read_are_records(proxy: Any, tmp_path: Path) -> None:
    entries = manifest()
    boto3.client("s3").delete_object(Bucket=BUCKET, Key="drive/1.bin")
    proxy.spoil = lambda method, path, headers: 503 if "2.bin" in path else None
    assert predict(entries, tmp_path / "out") == [None, "object_not_found", "storage_failed", None]


def test_a_frame_is_denied_alone_to_an_account_that_may_not_list(
    proxy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = manifest()
    # S3 answers 403 for a missing key too, if the account may not list its bucket.
    proxy.spoil = lambda method, path, headers: 403 if "list-type" in path or "0.bin" in path else None
    monkeypatch.setattr(
        retry, "_READ_PAUSES_S", (0.01,) * 1000
    )  # until one of the others, read beside, is there
    retry._last_read.clear()
    assert predict(entries, tmp_path / "out") == ["access_denied", None, None, None]


def test_a_frame_is_read_again_when_its_bucket_fails_for_a_time(proxy: Any, tmp_path: Path) -> None:
    entries, failures = manifest(), [503] * 3

    proxy.spoil = lambda method, path, headers: failures.pop() if failures and ".bin" in path else None
    assert predict(entries, tmp_path / "out") == [None] * 4 and not failures


def test_a_source_that_is_gone_ends_the_part_instead_of_failing_its_frames(
    proxy: Any, tmp_path: Path
) -> None:
    entries = manifest()
    for status in (503, 403):
        proxy.spoil = lambda method, path, headers, status=status: status
        with pytest.raises(SourceGone):
            predict(entries, tmp_path / "out")


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Web]:
    """A web server with four frames, called as a download would check them by a hash."""
    monkeypatch.setattr(retry, "_READ_PAUSES_S", (0.01, 0.01))
    monkeypatch.setattr(download.read, "__kwdefaults__", {"timeout_s": 5.0, "retries": 0, "backoff_s": 0.0})
    retry._last_read.clear()
    with servers.web() as made:
        made.files = {f"scan-2024010{k}:0.bin": b"x" * 16 * (k + 1) for k in range(4)}
        yield made


def answer(status: int, left: list[int] | None = None) -> Any:
    """Make an answer of a web server: a status, or one of `left` while there are any and then a frame."""

    def send(handler: servers.Handler) -> None:
        found, body = (left.pop(), b"") if left else (status, b"x" if status == 200 else b"")
        handler.send_response(found)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)

    return send


def web_entries(site: servers.Web) -> list[bytes]:
    return [manifest_line(frame_at(name, name, site.url(name), Clip("web"))) for name in sorted(site.files)]


def test_frames_of_a_web_server_are_asked_for_again_or_recorded(site: Any, tmp_path: Path) -> None:
    entries, names, failures = web_entries(site), sorted(site.files), [503, 503]
    site.answers[names[0]] = answer(200, failures)
    del site.files[names[1]]
    site.answers[names[2]] = answer(503)
    found = predict(entries, tmp_path / "out")
    assert found == [None, "object_not_found", "download_failed", None] and not failures
    (text,) = (line for line in (tmp_path / "out").read_text().splitlines() if "download_failed" in line)
    assert tempfile.gettempdir() not in text  # the same run has the same bytes


def test_a_frame_is_denied_alone_by_a_web_server_that_gives_others(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_READ_PAUSES_S", (0.01,) * 1000)
    site.answers[""] = site.answers[sorted(site.files)[0]] = answer(403)
    assert predict(web_entries(site), tmp_path / "out") == ["access_denied", None, None, None]


@pytest.mark.parametrize("status", [400, 500])
def test_a_web_server_without_a_first_page_is_asked_for_another_frame(
    status: int, site: Any, tmp_path: Path
) -> None:
    entries, first = web_entries(site), sorted(site.files)[0]
    site.answers = {"": answer(status), first: answer(503)}
    assert predict(entries[1:], tmp_path / "out") == [None] * 3
    assert predict(entries, tmp_path / "out") == ["download_failed", None, None, None]


@pytest.mark.parametrize("is_foreseen", [False, True])
def test_a_full_disk_is_no_error_of_a_frame_of_a_web_server(
    is_foreseen: bool, site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(file: Any, piece: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space")

    if is_foreseen:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    else:
        monkeypatch.setattr(download, "_write", fill)
    with pytest.raises(SourceGone):
        predict(web_entries(site), tmp_path / "out")


def test_nothing_is_tried_again_long_after_it_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, attempts = [0.0], [0]

    def wait(seconds: float) -> None:
        now[0] += seconds

    def stall() -> None:
        attempts[0] += 1
        wait(157)
        raise StorageError("no data")

    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=wait))
    for action in (retry.repeat_reading, retry.repeat):
        now[0], attempts[0] = 0.0, 0
        with pytest.raises(StorageError):
            action(stall)
        assert attempts[0] == 2 and now[0] < 360


def test_a_web_server_that_is_gone_ends_the_part_instead_of_failing_its_frames(
    site: Any, tmp_path: Path
) -> None:
    for status in (503, 403):
        site.answers = dict.fromkeys(("", *site.files), answer(status))
        with pytest.raises(SourceGone):
            predict(web_entries(site), tmp_path / "out")


def test_parts_of_a_frame_in_several_places_end_the_run_if_one_of_those_is_gone(
    proxy: Any, site: Any, tmp_path: Path
) -> None:
    name = sorted(site.files)[0]
    parts = {"a": f"s3://{BUCKET}/drive/0.bin", "b": site.url(name), "c": str(tmp_path / "c.bin")}
    (tmp_path / "c.bin").write_bytes(b"x")
    entries = [manifest_line(frame_at("one", "one", parts, Clip("parts")))]
    assert predict(entries, tmp_path / "out") == [None]
    site.answers = dict.fromkeys(("", name), answer(503))
    with pytest.raises(SourceGone):
        predict(entries, tmp_path / "out")
    site.answers[""] = answer(404)
    assert predict(entries, tmp_path / "out") == ["download_failed"]


def test_a_listing_goes_on_where_it_failed(proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_PAGE_KEYS", 1)
    expected, pages, failures = manifest(), [0], [503]

    def spoil(method: str, path: str, headers: Any) -> int | None:
        pages[0] += "list-type" in path
        return failures.pop() if failures and pages[0] > 2 else None

    proxy.spoil = spoil
    assert manifest() == expected and not failures and pages[0] < 9  # it does not begin anew


def test_results_outlast_a_bucket_that_fails_for_a_time(proxy: Any) -> None:
    destination = Destination(f"s3://{BUCKET}/out")
    for failures in ([503, 503], [503] * 3):
        spoiled = list(failures)
        proxy.spoil = lambda method, path, headers, left=spoiled: (
            left.pop() if left and method == "PUT" else None
        )
        if len(failures) < 3:
            with destination.writing("parts/00000000.jsonl") as file:
                file.write(b"results")
            assert destination.read("parts/00000000.jsonl") == b"results"
        else:
            with pytest.raises(StorageError), destination.writing("parts/00000001.jsonl") as file:
                file.write(b"results")
            assert destination.finished() == {0}


def test_results_of_a_bucket_that_fails_for_a_time_are_asked_for_again(proxy: Any) -> None:
    destination, name = Destination(f"s3://{BUCKET}/read"), "parts/00000000.jsonl"
    destination.write(name, b"a\nb\n")
    for action, expected in (
        (lambda: list(destination.lines(name)), [b"a\n", b"b\n"]),
        (destination.finished, {0}),
        (lambda: destination.exists(name), True),
        (lambda: destination.remove(name), None),
    ):
        left = [503, 503]
        proxy.spoil = lambda method, path, headers, left=left: left.pop() if left else None
        assert action() == expected and not left
    assert destination.finished() == set()


def test_files_of_a_bucket_on_their_way_leave_nothing_when_the_process_is_killed(
    proxy: Any, tmp_path: Path
) -> None:
    script = (
        "import os; from contextlib import ExitStack; from pathlib import Path; from serve.bulk import run; "
        f"from serve.bulk.destination import Destination; to = Destination('s3://{BUCKET}/killed')\n"
        "with to.writing('manifest.jsonl') as file: file.write(b'lines')\n"
        "with ExitStack() as stack, to.writing('parts/00000000.jsonl') as file:\n"
        "    path = run._local_manifest(to, stack); file.write(b'unfinished'); file.flush()\n"
        "    print(path.read_text(), flush=True); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"lines\n")
    assert not list(tmp_path.iterdir()) and not Destination(f"s3://{BUCKET}/killed").finished()


def test_a_run_that_cannot_begin_leaves_no_folder_of_its_own(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for out in (there, tmp_path / "a" / "out"):
        with pytest.raises(ServeError):
            bulk.main([str(tmp_path / "none"), "--model", str(tmp_path / "none.mar"), "--out", str(out)])
    assert list(tmp_path.iterdir()) == [there] and not list(there.iterdir())


def test_a_run_with_fewer_results_than_frames_does_not_end_as_a_whole_one(tmp_path: Path) -> None:
    class Forgetful(fake.OneProcess):
        def compute(self, parts: Any, *more: Any) -> Any:
            return super().compute(itertools.islice(parts, 1), *more)

    (tmp_path / "frames").mkdir()
    for k in range(4):
        (tmp_path / "frames" / f"{k}.bin").write_bytes(b"good")
    with pytest.raises(StorageError):
        run(tmp_path / "frames", tmp_path / "out", engine=Forgetful(), part_frames=3)
    assert not (tmp_path / "out" / "summary.json").exists()
    assert run(tmp_path / "frames", tmp_path / "out", engine=fake.OneProcess(), part_frames=3).computed == 1


def test_failed_frames_are_computed_again_on_demand(tmp_path: Path) -> None:
    source, out = tmp_path / "frames", tmp_path / "out"
    source.mkdir()
    for k in range(6):
        (source / f"{k}.bin").write_bytes(b"bad" if k == 4 else b"good")
    run(source, out)
    (source / "4.bin").write_bytes(b"mended")
    task, destination = (
        BulkRun(Job("model.mar", False, FrameOptions(), 2, fake.open_echo), {"model": "one"}, 3),
        Destination(str(out)),
    )
    with ExitStack() as stack:
        plan = plan_run(
            task, destination, lambda: open_source(source, "lidar"), stack, overwrite=False, retry_failed=True
        )
        assert plan.finished == {0}
        assert not (out / "summary.json").exists()  # which readers take for the end
        summary = execute(task, plan, destination, LocalEngine(("cpu",), 1))
    assert (summary.computed, summary.counts.failed.total(), summary.counts.frames) == (3, 0, 6)
    assert not [each for each in lines(out) if "error" in each]


def test_an_interrupt_ends_every_process_and_leaves_no_file_of_theirs(tmp_path: Path) -> None:
    source, out, gate, scratch = (tmp_path / name for name in ("frames", "out", "gate", "scratch"))
    source.mkdir()
    scratch.mkdir()
    for k in range(8):
        (source / f"{k}.bin").write_bytes(b"gate %b" % str(gate).encode())
    script = (
        "from pathlib import Path; from tests.bulk.test_run import run; "
        f"run(Path({str(source)!r}), Path({str(out)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)}
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, stderr=subprocess.PIPE
    ) as process:
        eventually(lambda: (tmp_path / "gate.reached").exists(), 60)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT  # Python's own end by KeyboardInterrupt
    assert len(children) >= 2 and not psutil.wait_procs(children, timeout=10)[1]
    assert not list(scratch.glob("mmdet3d-serve-*")) and not os.listdir(out / "parts")
