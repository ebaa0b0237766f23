"""`mmdet3d-serve evaluate` on data, metrics or servers that do not fit: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from serve.cli.main import main
from tests.conftest import ASSETS, pick_free_ports
from tests.evaluate import made_predictions
from tests.evaluate.answering import answering


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "data"
    answers = made_predictions.coco(folder).answers
    (folder / "mine.py").write_bytes((ASSETS / "fcos_sample.py").read_bytes())
    return folder, answers


@pytest.fixture
def data(whole, tmp_path) -> Path:
    """A copy of the data set with its config, to be spoilt."""
    shutil.copytree(whole[0], tmp_path / "data")
    return tmp_path / "data"


def refused(capsys, data: Path, *arguments: str) -> str:
    """The sentence of the error."""
    out = data.parent / "out" / "served.pkl"
    out.parent.mkdir()
    assert main(["evaluate", str(data / "mine.py"), "--out", str(out), "--model", "made", *arguments]) == 2
    assert not list(out.parent.iterdir())
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = [line for line in captured.err.splitlines() if not line.startswith(("[", "warning: "))]
    assert line.startswith("error: ") and "Traceback" not in line
    return line


def change(data: Path, before: str, after: str) -> None:
    text = (data / "mine.py").read_text()
    assert before in text
    (data / "mine.py").write_text(text.replace(before, after))


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("annotations/instances_val2017.json", "instances_val2017.json"),
        ("val2017", "val2017"),
    ],
)
def test_what_is_missing_is_named(missing, named, data, capsys):
    path = data / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert named in refused(capsys, data)


def test_a_missing_folder_is_named(data, capsys):
    change(data, '"{{ fileDirname }}/"', '"no/such/folder/"')
    assert "no/such/folder" in refused(capsys, data)


def test_a_missing_picture_is_named(whole, data, capsys):
    last = sorted((data / "val2017").iterdir())[-1]
    last.unlink()
    with answering(whole[1]) as address:
        assert last.name in refused(capsys, data, "--url", address)


def test_broken_annotations_are_an_error_of_the_data(data, capsys):
    (data / "annotations" / "instances_val2017.json").write_text('{"images": []')
    assert "CocoDataset" in refused(capsys, data)


def test_annotations_without_a_class_are_refused_because_labels_would_shift(data, capsys):
    path = data / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "disc"
    path.write_text(json.dumps(content))
    assert "circle" in refused(capsys, data)


def test_another_order_of_classes_is_refused(whole, data, capsys):
    change(data, '("circle", "square", "triangle")', '("square", "circle", "triangle")')
    with answering(whole[1]) as address:
        assert "circle, square, triangle" in refused(capsys, data, "--url", address)


def test_classes_in_another_order_than_the_annotations_are_warned_of(data, capsys):
    change(data, '("circle", "square", "triangle")', '("square", "circle", "triangle")')
    assert main(["evaluate", str(data / "mine.py"), "--model", "made", "--url", "127.0.0.1:1"]) == 2
    (warned,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "categories as circle, square, triangle" in warned and "classes square, circle, triangle" in warned


def test_boxes_of_another_kind_are_refused(whole, data, capsys):
    clouds = {"bboxes_3d": [], "scores_3d": [], "labels_3d": [], "box_type_3d": "LiDAR", "names": []}
    with answering(dict.fromkeys(whole[1], clouds)) as address:
        assert "3D" in refused(capsys, data, "--url", address)


@pytest.mark.parametrize(
    "answer",
    [
        {"bboxes": [[1, 2, 3]], "scores": [0.5], "labels": [0]},
        {"bboxes": [[1, 2, 3, 4]], "scores": [0.5, 0.6], "labels": [0]},
        {"bboxes": "none", "scores": [], "labels": []},
        {"bboxes": []},
        {"bboxes": [[1, 2, 3, 4]], "scores": [0.5], "labels": [7]},
        {"pts_semantic_mask": {}},
    ],
)
def test_answers_that_are_no_detections_of_these_classes_are_refused(answer, whole, data, capsys):
    with answering(dict.fromkeys(whole[1], answer)) as address:
        refused(capsys, data, "--url", address)


def test_a_server_that_is_down_or_lacks_the_model_is_named(whole, data, capsys):
    (port,) = pick_free_ports(1)
    assert f"127.0.0.1:{port}" in refused(capsys, data, "--url", f"127.0.0.1:{port}")
    (data.parent / "out").rmdir()
    with answering(whole[1], model="other") as address:
        assert "made" in refused(capsys, data, "--url", address)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("test_evaluator = val_evaluator", "", "test_evaluator"),
        ("test_dataloader = val_dataloader", "", "test_dataloader"),
        (
            "test_evaluator = val_evaluator",
            'test_evaluator = dict(type="CocoPanopticMetric")',
            "CocoPanopticMetric",
        ),
        ("test_evaluator = val_evaluator", 'test_evaluator = dict(type="MyMetric")', "MyMetric"),
        ('type="CocoDataset"', 'type="MyDataset"', "MyDataset"),
        ('type="LoadImageFromFile"', 'type="LoadMyImages"', "LoadMyImages"),
    ],
)
def test_a_config_that_cannot_be_evaluated_says_why(before, after, named, whole, data, capsys):
    change(data, before, after)
    with answering(whole[1]) as address:
        assert named in refused(capsys, data, "--url", address)


def test_one_of_a_server_and_an_archive_must_be_named(data, capsys):
    for arguments in ([], ["--model", "a", "--archive", "b.mar"]):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", str(data / "mine.py"), *arguments])
        assert ended.value.code == 2
    assert main(["evaluate", str(data / "mine.py"), "--archive", str(data / "no.mar")]) == 2
    assert "no.mar" in capsys.readouterr().err
