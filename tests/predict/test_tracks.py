"""``predict --track``: ids in every output, after a stop too, and over the moving scene with the demo SECOND."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import orjson
import pytest

from serve.cli.main import main
from serve.errors import BadRequest, UndecodableFrame
from serve.predict import LocalModel, open_source
from serve.predict.frames import Clip, Frame, Moment
from serve.predict.run import Run, formats_of, run
from serve.predict.sources import Source
from serve.synthetic.moving import generate_sequence
from serve.tracking import TrackOptions
from tests.predict.test_run import lines
from tools.demo import tracks_command


class ScriptedModel:
    """Answers a frame with the boxes that its bytes are the JSON of: places along x of boxes of one class."""

    identity: Mapping[str, str] = {"name": "scripted", "version": "1.0"}
    modality: Any = "lidar"
    load_dim = 4
    is_remote = False
    description: Any = MappingProxyType({})

    def prepare(self, body: Any, options: Any) -> Any:
        if body == b"bad":
            raise UndecodableFrame("bad")
        return orjson.loads(body)

    def submit(self, prepared: Sequence[Future[Any]]) -> Future[list[Any]]:
        done: Future[list[Any]] = Future()
        outcomes: list[Any] = []
        for each in prepared:
            try:
                places = each.result()
            except UndecodableFrame as error:
                outcomes.append(error)
                continue
            outcomes.append(
                {
                    "bboxes_3d": np.array([[x, 0, 0, 4, 2, 1.5, 0] for x in places]).reshape(-1, 7),
                    "scores_3d": np.full(len(places), 0.9),
                    "labels_3d": np.zeros(len(places), np.int64),
                    "names": ["Car"] * len(places),
                    "box_type_3d": "LiDAR",
                }
            )
        done.set_result(outcomes)
        return done

    def close(self) -> None:
        return


def write_frames(folder: Path, *frames: list[float] | None) -> Path:
    folder.mkdir(exist_ok=True)
    for number, places in enumerate(frames):
        (folder / f"{number:03d}.bin").write_bytes(b"bad" if places is None else orjson.dumps(places))
    return folder


def follow(source: Path | Source, out: Path | None, *formats: str, **options: Any) -> Any:
    model = ScriptedModel()
    opened = source if isinstance(source, Source) else open_source(source, "lidar")
    rules = TrackOptions(min_hits=1)
    return run(Run(opened, model, out, formats_of(out, formats, opened.count), tracks=rules, **options))


def ids(out: Path) -> list[list[int] | None]:
    return [
        line["answer"]["track_ids"] if "answer" in line else None for line in lines(out / "predictions.jsonl")
    ]


def test_ids_are_in_every_output(tmp_path: Path) -> None:
    source = write_frames(tmp_path / "clouds", [0.0, 20.0], [0.5, 20.0], [], [20.0, 1.5])
    out = tmp_path / "out"
    assert not follow(source, out, "json", "csv").failed
    assert ids(out) == [[1, 2], [1, 2], [], [2, 1]]
    assert orjson.loads((out / "json" / "003.json").read_bytes())["track_ids"] == [2, 1]
    with (out / "predictions.csv").open() as file:
        rows = [(row["frame"], int(row["track_id"]), float(row["x"])) for row in csv.DictReader(file)]
    assert rows[-2:] == [("003.bin", 2, 20.0), ("003.bin", 1, 1.5)]


def test_the_time_of_a_failed_frame_passes(tmp_path: Path) -> None:
    # At 4 m a frame the object is 8 m on after the failed frame.
    source = write_frames(tmp_path / "clouds", [0.0], [4.0], [8.0], [12.0], None, [20.0], [24.0])
    out = tmp_path / "out"
    assert len(follow(source, out, "jsonl").failed) == 1
    assert ids(out) == [[1], [1], [1], [1], None, [1], [1]]


def test_frames_have_the_times_in_their_names(tmp_path: Path) -> None:
    # 0.8 s are missing: at 40 m/s the object is then 36 m on, where one period says 4 m.
    places = {0: 0.0, 1: 4.0, 2: 8.0, 3: 12.0, 12: 48.0}
    found = {}
    for origin in (1532402927_000000, 0):
        source = tmp_path / f"clouds-{origin}"
        source.mkdir()
        for k, place in places.items():
            (source / f"{origin + 100_000 * k:016}.bin").write_bytes(orjson.dumps([place]))
        follow(source, tmp_path / f"out-{origin}", "jsonl")
        found[origin] = ids(tmp_path / f"out-{origin}")
    assert found[1532402927_000000] == [[1]] * 5
    assert found[0] == [[1]] * 4 + [[2]]


def test_a_run_that_goes_on_gives_the_ids_of_one_without_a_stop(tmp_path: Path) -> None:
    frames = [[3.0 * k, 100 - 3.0 * k] for k in range(12)]
    source = write_frames(tmp_path / "clouds", *frames)
    follow(source, tmp_path / "whole", "jsonl")
    out = tmp_path / "stopped"

    class Stopped(Exception):
        pass

    def stop(prediction: Any) -> None:
        if prediction.frame.name == "006.bin":
            raise Stopped

    opened = open_source(source, "lidar")
    task = Run(opened, ScriptedModel(), out, ("jsonl",), tracks=TrackOptions(min_hits=1))
    with pytest.raises(Stopped):
        run(task, progress=stop)
    assert run(task).kept == 7
    assert lines(out / "predictions.jsonl") == lines(tmp_path / "whole" / "predictions.jsonl")


def test_ids_change_when_an_earlier_frame_no_longer_fails(tmp_path: Path) -> None:
    # Without the second frame the object is 10 m off where it is looked for, and gets a new id.
    source = write_frames(tmp_path / "clouds", [0.0], None, [10.0], [15.0])
    out = tmp_path / "out"
    follow(source, out, "json")
    assert ids(out) == [[1], None, [2], [2]]
    (source / "001.bin").write_bytes(orjson.dumps([5.0]))
    # Only the failed frame is computed again; files of the others are written with their new ids.
    summary = follow(source, out, "json")
    assert (summary.predicted, summary.kept, summary.failed) == (1, 3, [])
    assert sorted(i for found in ids(out) for i in found or ()) == [1, 1, 1, 1]
    assert len(ids(out)) == 4
    assert orjson.loads((out / "json" / "003.json").read_bytes())["track_ids"] == [1]


def test_times_of_frames_are_used(tmp_path: Path) -> None:
    clip = Clip("drive")

    def frame(number: int, nanoseconds: int) -> Frame:
        body = orjson.dumps([8e-9 * nanoseconds])  # 8 m/s
        name = f"{number}"
        return Frame(name, name, clip, lambda: body, moment=Moment(nanoseconds, Fraction(1, 10**9)))

    # Half a second is missing, and one time occurs twice.
    stamps = [10**8 * k for k in (0, 1, 2, 3, 4, 5, 11, 11, 12)]
    frames = tuple(frame(number, stamp) for number, stamp in enumerate(stamps))
    out = tmp_path / "out"
    follow(Source("drive", len(frames), False, (clip,), (frames,)), out, "jsonl")
    assert {i for found in ids(out) for i in found or ()} == {1}


def test_a_new_clip_begins_anew(tmp_path: Path) -> None:
    body = orjson.dumps([0.0])
    frames = tuple(
        Frame(f"{name}{k}", f"{name}{k}", clip, lambda: body)
        for name, clip in (("a", Clip("a")), ("b", Clip("b")))
        for k in range(2)
    )
    out = tmp_path / "out"
    follow(Source("both", 4, False, (Clip("a"), Clip("b")), (frames,)), out, "jsonl")
    assert ids(out) == [[1], [1], [1], [1]]


def test_tracks_are_part_of_what_a_record_belongs_to(tmp_path: Path) -> None:
    source = write_frames(tmp_path / "clouds", [0.0], [1.0])
    out = tmp_path / "out"
    follow(source, out, "jsonl")
    with pytest.raises(BadRequest):
        run(Run(open_source(source, "lidar"), ScriptedModel(), out, ("jsonl",)))


def test_rules_of_tracks_need_track(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(tmp_path), "--model", "second.mar", "--track-score", "0.5"]) == 2
    assert "--track" in capfd.readouterr().err


@pytest.mark.slow
def test_the_demo_second_switches_no_id_over_the_moving_scene(second: LocalModel, tmp_path: Path) -> None:
    frames = list(generate_sequence(30))
    clouds = tmp_path / "velodyne"
    clouds.mkdir()
    for number, frame in enumerate(frames):
        (clouds / f"{number:06d}.bin").write_bytes(frame.scene.to_bytes())
    out = tmp_path / "out"
    source = open_source(clouds, second.modality)
    run(Run(source, second, out, ("jsonl",), tracks=TrackOptions(), batch_size=4))
    answers = (line["answer"] for line in lines(out / "predictions.jsonl"))
    scores = tracks_command.measure(frames, answers)
    assert scores["all"].objects > 200
    assert scores["all"].switches == 0
    assert scores["Car"].mota > 0.8 and scores["Pedestrian"].mota > 0.8
