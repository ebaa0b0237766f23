"""`serve.verify.endpoint` on a real socket: frames, tokens, and what differs from a scripted native model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from serve import errors
from serve.client import Client, frame_parts
from serve.verify.endpoint import find_frames, read_token, verify
from serve.verify.report import draw_report, frame_table, summary
from tests.verify.scripted import LIDAR_BOX, FakeTorchServe, Scripted, lidar_answer


def test_find_frames_lists_a_folder_in_order(tmp_path: Path) -> None:
    for name in ("b.bin", "a.BIN", "c.npy", "d.png", "labels.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.bin").mkdir()
    assert [p.name for p in find_frames(tmp_path, "lidar")] == ["a.BIN", "b.bin", "c.npy"]
    assert [p.name for p in find_frames(tmp_path, "image")] == ["d.png"]


def test_find_frames_takes_a_folder_with_sweeps_for_one_frame(tmp_path: Path) -> None:
    for frame in (tmp_path / "one", tmp_path / "two"):
        frame.mkdir()
        for name in ("points.bin", "sweep.0.bin", "sweeps.json"):
            (frame / name).write_bytes(b"")
    (tmp_path / "alone.bin").write_bytes(b"")
    assert [p.name for p in find_frames(tmp_path, "lidar")] == ["alone.bin", "one", "two"]
    assert find_frames(tmp_path / "one", "lidar") == [tmp_path / "one"]
    assert set(frame_parts(tmp_path / "one")) == {"points", "sweep.0", "sweeps"}


def test_find_frames_rejects_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(errors.UndecodableFrame, match=r"\.bin, \.npy"):
        find_frames(tmp_path, "lidar")
    with pytest.raises(errors.UndecodableFrame):
        find_frames(tmp_path / "nowhere", "image")


def test_read_token_reads_bare_tokens_and_key_files(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("abc-DEF_1\n")
    assert read_token(path) == "abc-DEF_1"
    path.write_text(json.dumps({"management": {"key": "no"}, "inference": {"key": "yes"}}))
    assert read_token(path) == "yes"
    for bad in ("", "two words", '{"management": {}}', "{", "ключ"):
        path.write_text(bad)
        with pytest.raises(errors.BadRequest):
            read_token(path)
    with pytest.raises(errors.BadRequest):
        read_token(tmp_path / "none")


def test_verify_sends_both_sides_the_same_threshold(server: FakeTorchServe, frame: Path) -> None:
    server.answer = lambda body, options: lidar_answer(0.9, 0.4)
    native = Scripted({"frame.bin": lidar_answer(0.9, 0.4, 0.24)})
    with Client(server.address) as client:
        reports = list(verify([frame], native, client, "second", score_thr=0.25))
    assert reports[0].comparison.ok
    assert server.asked == [("/predictions/second", {"score_thr": "0.25"})]
    assert "2 detections compared" in summary(reports)


def test_verify_accepts_no_detections(server: FakeTorchServe, frame: Path) -> None:
    server.answer = lambda body, options: lidar_answer()
    with Client(server.address) as client:
        reports = list(verify([frame], Scripted(), client, "second"))
    assert reports[0].comparison.ok
    assert "--score-thr" in summary(reports)
    assert "no detections on either side" in frame_table(reports[0])


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (lidar_answer(box_type_3d="Depth"), "type Depth"),
        (lidar_answer(0.9, names=["Van"]), "'Van'"),
        (lidar_answer(0.9, labels_3d=[7]), "label 7"),
        (lidar_answer(classes=["Car"]), "Pedestrian, Cyclist, Car"),
        ({"bboxes": [], "scores": [], "labels": []}, "2D"),
    ],
)
def test_another_model_under_the_name_raises_model_not_found(
    server: FakeTorchServe, frame: Path, answer: dict[str, Any], detail: str
) -> None:
    server.answer = lambda body, options: answer
    native = Scripted({"frame.bin": lidar_answer(0.9)})
    with (
        Client(server.address) as client,
        pytest.raises(errors.ModelNotFound) as caught,
    ):
        list(verify([frame], native, client, "second"))
    assert detail in str(caught.value)


def test_response_without_detections_raises_backend_broken(server: FakeTorchServe, frame: Path) -> None:
    server.answer = lambda body, options: {"hello": "world"}
    with Client(server.address) as client, pytest.raises(errors.BackendBroken, match="hello"):
        list(verify([frame], Scripted(), client, "second"))


def test_summary_names_differing_frames_and_largest_deviation(server: FakeTorchServe, tmp_path: Path) -> None:
    frames = [tmp_path / f"{k}.bin" for k in range(3)]
    for k, path in enumerate(frames):
        np.full((1, 4), k, np.float32).tofile(path)
    native = Scripted({path.name: lidar_answer(0.9) for path in frames})

    def answer(body: bytes, options: Mapping[str, str]) -> dict[str, Any]:
        moved = 0.25 if np.frombuffer(body, np.float32)[0] == 1 else 0.0
        return lidar_answer(0.9, box=[LIDAR_BOX[0] + moved, *LIDAR_BOX[1:]])

    server.answer = answer
    with Client(server.address) as client:
        reports = list(verify(frames, native, client, "second"))
    assert [report.comparison.ok for report in reports] == [True, False, True]
    assert "MISMATCH: 2 of 3 frames agree" in summary(reports)
    assert "frames that differ: 1.bin" in summary(reports)
    assert "box 2.5e-01 m" in summary(reports)
    written = draw_report(reports[1], tmp_path / "drawn", 4)
    assert sorted(p.name for p in written) == ["1.bin.native.png", "1.bin.served.png"]
    assert cv2.imread(str(written[0])).shape == (900, 1200, 3)


def test_summary_notes_constant_predictions(server: FakeTorchServe, tmp_path: Path) -> None:
    frames = [tmp_path / f"{k}.bin" for k in range(2)]
    for path in frames:
        np.zeros((1, 4), np.float32).tofile(path)
    server.answer = lambda body, options: lidar_answer(0.9)
    native = Scripted({path.name: lidar_answer(0.9) for path in frames})
    with Client(server.address) as client:
        reports = list(verify(frames, native, client, "second"))
    assert "same in every frame" in summary(reports)
    assert "same in every frame" not in summary(reports[:1])
