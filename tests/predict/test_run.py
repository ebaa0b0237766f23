"""Runs of the demo SECOND over folders: what is written, what a stop leaves, what the next run does."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import orjson
import pytest

from serve.cli.main import main
from serve.errors import BadRequest, NotReady
from serve.predict import LocalModel, open_source, predict
from serve.predict.frames import Prediction
from serve.predict.run import Run, formats_of, run
from serve.protocol.options import FrameOptions
from tests.conftest import ROOT
from tests.predict.conftest import write_video
from tests.predict.fake_model import EchoModel
from tests.predict.test_kitti import KITTI


@pytest.fixture
def echo() -> Iterator[EchoModel]:
    made = EchoModel()
    made.modality = "image"
    yield made
    made.close()


def task(model: Any, source: Path, out: Path | None, *formats: str, **options: Any) -> Run:
    opened = open_source(source, model.modality)
    return Run(opened, model, out, formats_of(out, formats, opened.count), **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_every_format_of_a_folder_of_clouds(second: LocalModel, clouds: Path, tmp_path: Path) -> None:
    (tmp_path / "calib").mkdir()
    for k in range(3):
        (tmp_path / "calib" / f"{k:06d}.txt").write_text(KITTI)
    out = tmp_path / "out"
    summary = run(
        task(
            second, clouds, out, "json", "kitti", "csv", "picture", "video",
            options=FrameOptions(score_thr=0.5), image_size=(1242, 375), batch_size=2,
        )
    )  # fmt: skip
    assert (summary.predicted, summary.kept, summary.failed) == (3, 0, [])
    stems = [f"{k:06d}" for k in range(3)]
    assert files(out) == sorted(
        [
            *(f"json/{stem}.json" for stem in stems),
            *(f"kitti/{stem}.txt" for stem in stems),
            *(f"pictures/{stem}.png" for stem in stems),
            "predictions.csv", "predictions.jsonl", "run.json", "videos/velodyne.mp4",
        ]
    )  # fmt: skip
    recorded = lines(out / "predictions.jsonl")
    assert [line["frame"] for line in recorded] == [f"{stem}.bin" for stem in stems]
    for stem, line in zip(stems, recorded, strict=True):
        answer = orjson.loads((out / "json" / f"{stem}.json").read_bytes())
        assert answer == line["answer"]
        assert answer["names"] and min(answer["scores_3d"]) >= 0.5
        labels = (out / "kitti" / f"{stem}.txt").read_text().splitlines()
        assert 0 < len(labels) <= len(answer["names"]) and all(len(line.split()) == 16 for line in labels)
        assert cv2.imread(str(out / "pictures" / f"{stem}.png")).shape == (900, 1200, 3)
    rows = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    assert len(rows) == sum(len(line["answer"]["names"]) for line in recorded)
    first = recorded[0]["answer"]
    assert [float(rows[0][key]) for key in ("x", "y", "z", "dx", "dy", "dz", "yaw")] == first["bboxes_3d"][0]
    assert rows[0]["name"] == first["names"][0] and "vx" not in rows[0]
    with av.open(str(out / "videos" / "velodyne.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (1200, 900, 10)
        assert sum(1 for _ in container.decode(stream)) == 3


def test_answers_are_the_bytes_that_a_server_sends(second: LocalModel, clouds: Path, handler: Any) -> None:
    from serve.protocol.batch import unpack_outcomes
    from serve.protocol.worker import Batch, EncodedFrame, write_outcomes

    for prediction in predict(clouds, second, score_thr=0.2, batch_size=2):
        body = (clouds / prediction.frame.name).read_bytes()
        frame = EncodedFrame(body, FrameOptions(score_thr=0.2))
        ((status, served),) = unpack_outcomes(write_outcomes(*handler.answer(Batch([frame])))).items
        assert (status, bytes(served)) == (200, prediction.encoded)


def test_one_frame_goes_to_standard_output_as_the_answer(second: LocalModel, clouds: Path) -> None:
    output = io.BytesIO()
    run(task(second, clouds / "000001.bin", None), output=output)
    (prediction,) = predict(clouds / "000001.bin", second)
    assert output.getvalue() == prediction.encoded + b"\n"


def test_one_class_can_be_kept(second: LocalModel, clouds: Path, tmp_path: Path) -> None:
    run(task(second, clouds / "000000.bin", tmp_path / "all.json"))
    run(task(second, clouds / "000000.bin", tmp_path / "cars.json", only=("Car",)))
    everything, cars = (json.loads((tmp_path / name).read_bytes()) for name in ("all.json", "cars.json"))
    kept = [k for k, name in enumerate(everything["names"]) if name == "Car"]
    assert 0 < len(kept) < len(everything["names"])
    assert cars["bboxes_3d"] == [everything["bboxes_3d"][k] for k in kept]
    assert set(cars["names"]) == {"Car"} and cars["classes"] == everything["classes"]
    assert not list(tmp_path.glob(".*"))  # the record of a finished file is gone


def images(folder: Path, count: int) -> Path:
    folder.mkdir()
    for k in range(count):
        cv2.imwrite(str(folder / f"{k:03d}.png"), np.full((40, 60, 3), k, np.uint8))
    return folder


def test_frames_that_failed_are_listed_recorded_and_tried_again(echo: EchoModel, tmp_path: Path) -> None:
    folder = images(tmp_path / "in", 3)
    good = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(b"bad")
    summary = run(task(echo, folder, tmp_path / "out"))
    assert summary.predicted == 2 and [name for name, _ in summary.failed] == ["001.png"]
    assert lines(tmp_path / "out" / "predictions.jsonl")[1]["error"]["code"] == "undecodable_frame"
    (folder / "001.png").write_bytes(good)
    summary = run(task(echo, folder, tmp_path / "out"))
    assert (summary.predicted, summary.kept, summary.failed) == (1, 2, [])
    assert "error" not in (tmp_path / "out" / "predictions.jsonl").read_text()


def test_a_format_that_is_added_is_written_without_predicting_again(echo: EchoModel, tmp_path: Path) -> None:
    folder, out = images(tmp_path / "in", 3), tmp_path / "out"
    run(task(echo, folder, out))
    summary = run(task(echo, folder, out, "picture", "coco", "video"))
    assert (summary.predicted, summary.kept, sum(echo.batches)) == (0, 3, 3)
    assert files(out / "pictures") == ["000.jpg", "001.jpg", "002.jpg"]
    assert len(json.loads((out / "coco.json").read_bytes())) == 3
    with av.open(str(out / "videos" / "in.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 3


def test_a_frame_that_cannot_be_drawn_fails_alone(echo: EchoModel, tmp_path: Path) -> None:
    folder, out = images(tmp_path / "in", 3), tmp_path / "out"
    (folder / "001.png").write_bytes(b"no image, and yet the model took it")
    summary = run(task(echo, folder, out, "picture"))
    assert [name for name, _ in summary.failed] == ["001.png"]
    assert files(out / "pictures") == ["000.jpg", "002.jpg"]
    assert [line["frame"] for line in lines(out / "predictions.jsonl")] == ["000.png", "001.png", "002.png"]


def test_another_drawing_threshold_draws_again_without_predicting(echo: EchoModel, tmp_path: Path) -> None:
    folder, out = images(tmp_path / "in", 1), tmp_path / "out"
    run(task(echo, folder, out, "picture"))
    drawn = (out / "pictures" / "000.jpg").read_bytes()
    summary = run(task(echo, folder, out, "picture", drawn_score_thr=0.9))
    assert summary.predicted == 0
    assert (out / "pictures" / "000.jpg").read_bytes() != drawn


def shown(path: Path) -> list[tuple[float, Any]]:
    """Time and pixels of the frames of a video."""
    with av.open(str(path)) as container:
        return [
            (frame.time, frame.to_ndarray(format="bgr24").astype(int)) for frame in container.decode(video=0)
        ]


@pytest.mark.parametrize("how", [KeyboardInterrupt, NotReady])
def test_a_run_that_is_stopped_goes_on_and_ends_as_if_it_had_not_been(
    echo: EchoModel, drive: Path, tmp_path: Path, how: type[BaseException]
) -> None:
    whole, parts = tmp_path / "whole.mp4", tmp_path / "parts.mp4"
    run(task(echo, drive, whole))
    computed = sum(echo.batches)
    done: list[str] = []

    def stop(prediction: Prediction) -> None:
        done.append(prediction.frame.name)
        if len(done) == 4:
            raise how("now")

    with pytest.raises(how):
        run(task(echo, drive, parts), progress=stop)
    assert not parts.exists()
    echo.batches.clear()
    summary = run(task(echo, drive, parts))
    assert (summary.predicted, summary.kept) == (2, 4)
    assert sum(echo.batches) == 2 and computed == 6
    # x264 is not the same to the bit from run to run.
    for one, other in zip(shown(parts), shown(whole), strict=True):
        assert one[0] == other[0] and np.abs(one[1] - other[1]).mean() < 2
    assert files(tmp_path) == ["drive.mp4", "parts.mp4", "whole.mp4"]


def test_a_video_keeps_rate_size_and_direction(echo: EchoModel, tmp_path: Path) -> None:
    source = write_video(tmp_path / "turned.mp4", 4, rate=Fraction(24000, 1001), rotation=90)
    run(task(echo, source, tmp_path / "seen.mp4"))
    with av.open(str(tmp_path / "seen.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (120, 160)
        assert stream.average_rate == Fraction(24000, 1001)
        shown = [frame for frame in container.decode(stream)]
    assert [frame.rotation for frame in shown] == [0] * 4
    first = next(iter(open_source(source, "image")))
    assert first.pixels is not None
    there = shown[0].to_ndarray(format="bgr24")[40:, 40:].astype(int)  # away from the box
    assert np.abs(there - first.pixels()[40:, 40:]).mean() < 6


def test_coco_results_are_what_pycocotools_reads(echo: EchoModel, tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    folder = images(tmp_path / "in", 2)
    truth = {
        "images": [
            {"id": 70 + k, "file_name": f"val/{k:03d}.png", "width": 60, "height": 40} for k in range(2)
        ],
        "categories": [{"id": 3, "name": "car"}],
        "annotations": [],
        "info": {},
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    run(task(echo, folder, tmp_path / "coco.json", "coco", annotations=tmp_path / "truth.json"))
    found = json.loads((tmp_path / "coco.json").read_bytes())
    assert found[0] == {"image_id": 70, "category_id": 3, "bbox": [1, 2, 2, 3], "score": 0.5}
    read = COCO(str(tmp_path / "truth.json")).loadRes(str(tmp_path / "coco.json"))
    assert sorted(read.getImgIds(catIds=[3])) == [70, 71]
    (tmp_path / "truth.json").write_text(json.dumps({**truth, "categories": [{"id": 3, "name": "van"}]}))
    with pytest.raises(BadRequest, match="car"):
        run(task(echo, folder, tmp_path / "again.json", "coco", annotations=tmp_path / "truth.json"))


@pytest.mark.parametrize(
    ("out", "formats", "count", "chosen"),
    [
        (None, (), 1, ("json",)),
        (None, (), 5, ("jsonl",)),
        ("folder", (), 5, ("json",)),
        ("folder", ("csv", "json", "csv"), None, ("csv", "json")),
        ("seen.mp4", (), 5, ("video",)),
        ("seen.csv", ("csv",), None, ("csv",)),
        ("seen.json", ("coco",), 5, ("coco",)),
        ("seen.json", (), 1, ("json",)),
    ],
)
def test_the_format_follows_from_the_output(
    out: str | None, formats: tuple[str, ...], count: int | None, chosen: tuple[str, ...]
) -> None:
    assert formats_of(None if out is None else Path(out), formats, count) == chosen


@pytest.mark.parametrize(
    ("out", "formats", "count"),
    [
        (None, ("picture",), 1),
        ("seen.png", (), 2),
        ("seen.json", (), None),
        ("seen.csv", ("json",), 1),
        ("seen.zip", (), 1),
    ],
)
def test_outputs_that_do_not_go_together_are_errors(
    out: str | None, formats: tuple[str, ...], count: int | None
) -> None:
    with pytest.raises(BadRequest):
        formats_of(None if out is None else Path(out), formats, count)


def test_labels_that_lack_a_calibration_stop_the_run_before_anything_is_written(
    second: LocalModel, clouds: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match="--calib"):
        run(task(second, clouds, tmp_path / "out", "kitti"))
    assert files(tmp_path / "out") == [".predictions.jsonl.part", "run.json"]
    assert (tmp_path / "out" / ".predictions.jsonl.part").read_bytes() == b""


def test_a_run_that_stops_before_its_first_frame_leaves_nothing_that_matters(
    echo: EchoModel, tmp_path: Path
) -> None:
    folder = images(tmp_path / "in", 2)
    (folder / "000.png").write_bytes(b"gone")
    for out in (tmp_path / "seen.csv", tmp_path / "seen"):
        with pytest.raises(NotReady):
            run(task(echo, folder, out))
    assert not list(tmp_path.glob(".*"))
    (folder / "000.png").write_bytes(b"back")
    summary = run(task(echo, folder, tmp_path / "seen", options=FrameOptions(score_thr=0.5)))
    assert summary.predicted == 2


# The command, as its user runs it.


def test_the_command_reports_a_bad_frame_and_exits_with_1(
    demo_mar: Path,
    clouds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(clouds)
    clouds.mkdir()
    (clouds / "bad.bin").write_bytes(b"abc")
    (clouds / "gone.bin").symlink_to(tmp_path / "nowhere")
    (clouds / "good.bin").write_bytes((ROOT / "serve" / "assets" / "sample.bin").read_bytes())
    assert main(["predict", str(clouds), "--model", str(demo_mar), "--device", "cpu"]) == 1
    text = capsys.readouterr().err
    assert "bad.bin" in text and "1 frame predicted, 1 failed" in text
    assert files(tmp_path / "predictions") == ["json/good.json", "predictions.jsonl", "run.json"]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["nowhere.bin"], "nowhere.bin"),
        (["s.bin", "--model", "no-such-model"], "no-such-model"),
        (["s.bin", "--model", "missing.mar"], "missing.mar"),
        (["s.bin", "--model", "x", "--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["s.bin", "--model", "x", "--url", "http://127.0.0.1:9", "--device", "cpu"], "--device"),
        (["s.bin", "--device", "cuda:99"], "cuda:99"),
        (["s.bin", "--format", "xml"], "xml"),
        (["s.bin", "--out", "x.csv", "--format", "json"], "x.csv"),
        (["s.bin", "--checkpoint", "x.pth"], "--checkpoint"),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(
    demo_mar: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    shown: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "serve" / "assets" / "sample.bin", "s.bin")
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(demo_mar)]
    assert main(["predict", *arguments]) == 2
    text = capsys.readouterr().err
    assert shown in text and "Traceback" not in text
    assert files(tmp_path) == ["s.bin"]
