"""A bulk run: parts that appear whole, exactly one line per frame, whatever ends its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from serve.bulk.destination import Destination
from serve.bulk.formats import Outputs
from serve.bulk.parts import Engine, Job
from serve.bulk.processes import LocalEngine
from serve.bulk.run import BulkRun, Summary, execute, plan_run
from serve.errors import BadRequest, SettingsError, SetupError, StorageError
from serve.predict.sources import open_source
from serve.protocol.options import FrameOptions
from tests.bulk import fake
from tests.conftest import ROOT
from tests.gateway.running import eventually


def run(
    source: Path | str,
    out: Path | str,
    *,
    open_model: Any = fake.open_echo,
    part_frames: int = 3,
    processes: int = 2,
    overwrite: bool = False,
    identity: str = "one",
    outputs: Outputs = Outputs(),  # noqa: B008 - frozen
    modality: Any = "lidar",
    engine: Engine | None = None,
    advance: Callable[[int], None] = lambda frames: None,
) -> Summary:
    destination = Destination(str(out))
    job = Job("model.mar", False, FrameOptions(), 2, open_model)
    task = BulkRun(job, {"model": identity}, part_frames, outputs, 2)
    with ExitStack() as stack:
        plan = plan_run(task, destination, lambda: open_source(source, modality), stack, overwrite=overwrite)
        return execute(task, plan, destination, engine or LocalEngine(("cpu",) * processes, 1), advance)


def lines(out: Path) -> list[dict[str, Any]]:
    parts = sorted((out / "parts").glob("*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_bytes().splitlines()]


def names(out: Path) -> list[str]:
    return [each["frame"] for each in lines(out)]


def test_every_frame_has_one_line_in_the_order_of_the_manifest(frames: Any, tmp_path: Path) -> None:
    source, out = frames(*(b"x" * 16 * k for k in range(1, 11))), tmp_path / "out"
    shown: list[int] = []
    summary = run(source, out, advance=shown.append)
    assert names(out) == [f"{k:04d}.bin" for k in range(10)]
    assert [each["answer"]["bytes"] for each in lines(out)] == [16 * k for k in range(1, 11)]
    assert (summary.counts.frames, summary.computed, sum(shown)) == (10, 10, 10)
    assert json.loads((out / "summary.json").read_text())["detections"] == {"Car": 10}
    assert not list((out / "parts").glob(".unfinished-*"))


def test_the_number_of_processes_does_not_change_a_byte(frames: Any, tmp_path: Path) -> None:
    source = frames(*(b"x" * k for k in range(1, 12)))
    for processes in (1, 3):
        run(source, tmp_path / str(processes), processes=processes)
    one, three = (
        {file.name: file.read_bytes() for file in (tmp_path / each / "parts").iterdir()} for each in "13"
    )
    assert one == three


def test_frames_that_cannot_be_read_are_records_with_their_error(frames: Any, tmp_path: Path) -> None:
    source, out = frames(b"1", b"bad", b"3"), tmp_path / "out"
    destination = Destination(str(out))
    task = BulkRun(Job("m", False, FrameOptions(), 2, fake.open_echo), {}, 3)
    with ExitStack() as stack:
        plan = plan_run(task, destination, lambda: open_source(source, "lidar"), stack, overwrite=False)
        (source / "0002.bin").unlink()  # gone after it was listed
        summary = execute(task, plan, destination, LocalEngine(("cpu",), 1))
    assert summary.counts.failed.total() == 2
    assert [each.get("error", {}).get("code") for each in lines(out)] == [
        None,
        "undecodable_frame",
        "undecodable_frame",
    ]


def test_a_frame_that_ends_its_process_gets_an_error_and_its_neighbours_are_answered(
    frames: Any, tmp_path: Path
) -> None:
    source, out = frames(b"1", b"2", b"deadly", b"4", b"deadly", b"6", b"7"), tmp_path / "out"
    shown: list[int] = []
    summary = run(source, out, advance=shown.append)
    assert names(out) == [f"{k:04d}.bin" for k in range(7)]
    failed = [each["frame"] for each in lines(out) if "error" in each]
    assert failed == ["0002.bin", "0004.bin"] and summary.counts.failed == {"inference_failed": 2}
    assert sum(shown) == 7


def test_a_process_that_ends_once_costs_no_frame(frames: Any, tmp_path: Path) -> None:
    source, out = frames(b"1", b"once %b" % str(tmp_path / "mark").encode(), b"3"), tmp_path / "out"
    assert not run(source, out).counts.failed
    assert len(names(out)) == 3


def test_a_model_that_cannot_be_loaded_ends_the_run(frames: Any, tmp_path: Path) -> None:
    for opener in (fake.open_broken, fake.open_dying, fake.open_short_of_memory):
        with pytest.raises(SetupError):
            run(frames(b"1"), tmp_path / opener.__name__, open_model=opener)
    assert not lines(tmp_path / "open_dying")


def test_a_run_goes_on_with_the_frames_it_was_begun_with(frames: Any, tmp_path: Path) -> None:
    source, out = frames(*(b"%d" % k for k in range(7))), tmp_path / "out"
    run(source, out)
    (out / "parts" / "00000001.jsonl").unlink()
    there: list[bool] = []
    kept = (out / "parts" / "00000000.jsonl").stat().st_mtime_ns
    (source / "9999.bin").write_bytes(b"came later")
    summary = run(source, out, advance=lambda frames: there.append((out / "summary.json").exists()))
    assert (summary.computed, summary.counts.frames) == (3, 7)
    assert not any(there) and (out / "summary.json").exists()
    assert (out / "parts" / "00000000.jsonl").stat().st_mtime_ns == kept and len(set(names(out))) == 7


def test_results_of_another_run_are_not_mixed(frames: Any, tmp_path: Path) -> None:
    source, out = frames(b"1", b"2"), tmp_path / "out"
    run(source, out)
    with pytest.raises(BadRequest):
        run(source, out, identity="two")
    run(source, out, identity="two", overwrite=True, part_frames=1)
    assert len(names(out)) == 2 and len(list((out / "parts").glob("*.jsonl"))) == 2


def test_results_of_an_unknown_run_are_not_taken_for_finished(frames: Any, tmp_path: Path) -> None:
    source, out = frames(b"1", b"2", b"3", b"4"), tmp_path / "out"
    run(source, out)
    (out / "bulk.json").unlink()
    with pytest.raises(BadRequest):
        run(source, out, identity="two")
    (out / "model.mar").write_bytes(b"of the former run")
    run(source, out, identity="two", overwrite=True)
    assert len(names(out)) == 4 and not (out / "model.mar").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"run": "of another program"}'])
def test_a_description_of_something_else_is_an_error(content: bytes, frames: Any, tmp_path: Path) -> None:
    source, out = frames(b"1"), tmp_path / "out"
    out.mkdir()
    (out / "bulk.json").write_bytes(content)
    with pytest.raises(BadRequest):
        run(source, out)
    assert (out / "bulk.json").read_bytes() == content


def test_what_a_run_reads_is_not_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "listed.jsonl").symlink_to("manifest.jsonl")
    destination = Destination(str(tmp_path))
    for given in (
        "manifest.jsonl",
        "link/model.mar",
        tmp_path / "coco.json",
        "listed.jsonl",
        f"file://{tmp_path}/bulk.json",
    ):
        with pytest.raises(SettingsError):
            destination.check_inputs(given)
    destination.check_inputs(
        "-", None, "second", tmp_path, "s3://bucket/manifest.jsonl", "other/manifest.jsonl"
    )
    with pytest.raises(SettingsError):
        Destination("s3://bucket/out/").check_inputs("s3://bucket/out/manifest.jsonl")


def test_an_altered_manifest_is_noticed(frames: Any, tmp_path: Path) -> None:
    source, out = frames(b"1", b"2"), tmp_path / "out"
    run(source, out)
    (out / "manifest.jsonl").write_bytes((out / "manifest.jsonl").read_bytes() * 2)
    with pytest.raises(BadRequest):
        run(source, out)


def test_a_destination_that_cannot_be_written_is_an_error(frames: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        run(frames(b"1"), tmp_path / "file")
    with pytest.raises(SettingsError):
        run(frames(b"1"), "https://example.com/results")


def test_a_killed_run_leaves_no_process_and_no_half_part(frames: Any, tmp_path: Path) -> None:
    gate, out, scratch = tmp_path / "gate", tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    source = frames(b"1", b"2", b"3", b"4", b"gate %b" % str(gate).encode(), b"6")
    script = (
        "from pathlib import Path; from tests.bulk.test_run import run; "
        f"run(Path({str(source)!r}), Path({str(out)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment) as process:
        eventually(
            lambda: (tmp_path / "gate.reached").exists() and (out / "parts" / "00000000.jsonl").exists(), 60
        )
        process.send_signal(signal.SIGKILL)
    assert not (out / "parts" / "00000001.jsonl").exists()
    eventually(lambda: not list(scratch.glob("mmdet3d-serve-*")), 10)
    gate.touch()
    summary = run(source, out)
    assert summary.computed == 3 and names(out) == [f"{k:04d}.bin" for k in range(6)]
    assert not list((out / "parts").glob(".unfinished-*"))
