"""Figures of `mmdet3d-serve evaluate` are upstream's own of the same predictions, and a loss is found."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest

from serve.cli.evaluate import _verdict
from serve.cli.main import main
from serve.evaluate.data_set import data_settings, open_data_set, upstream_session
from serve.evaluate.evaluation import Evaluation, Row
from serve.evaluate.frames import read_frames
from serve.storage.packed_folder import pack_folder
from tests.conftest import ASSETS, DEMO_CHECKPOINT
from tests.evaluate import made_predictions
from tests.evaluate.answering import answering

VOC = """
test_evaluator = dict(
    _delete_=True, type="VOCMetric", metric="mAP", iou_thrs=[0.5, 0.75], eval_mode="11points"
)
"""


def write_config(folder: Path, name: str, more: str = "") -> Path:
    """The sample's config beside the data, with the base that it needs, and changes in a second file."""
    for file in ("second_demo.py", name):
        (folder / file).write_bytes((ASSETS / file).read_bytes())
    if not more:
        return folder / name
    (folder / "changed.py").write_text(f"_base_ = [{name!r}]\n{more}")
    return folder / "changed.py"


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco") / "data"
    return folder, made_predictions.coco(folder)


@pytest.fixture(scope="module")
def kitti(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kitti") / "data"
    return folder, made_predictions.kitti(folder)


def evaluated(config: Path, address: str, capsys, *options: str) -> dict:
    assert main(["evaluate", str(config), "--url", address, "--model", "made", *options]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def upstream_figures(
    config: Path, predicted: dict, options: dict[str, str] | None = None
) -> dict[str, float]:
    """Figures of the config's evaluator as it stands, on the predictions that the answers were made of."""
    from mmengine.evaluator import Evaluator
    from mmengine.structures import InstanceData

    data = open_data_set(data_settings(config, options))
    with upstream_session(data.settings.scope):
        evaluator = Evaluator([dict(metric) for metric in data.settings.metrics])
        evaluator.dataset_meta = data.dataset.metainfo
        for frame in read_frames(data):
            body = next(part for part in frame.parts.values() if part in predicted)
            sample = frame.sample.clone()
            found = predicted[body]
            sample.pred_instances = found.get("pred_instances", InstanceData())
            if "pred_instances_3d" in found:
                sample.pred_instances_3d = found.pred_instances_3d
            evaluator.process([sample])
        return evaluator.evaluate(data.size)


def test_coco_figures_of_boxes_and_masks_are_upstreams(coco, capsys):
    folder, predictions = coco
    answers = predictions.answers
    config = write_config(folder, "fcos_sample.py", 'test_evaluator = dict(metric=["bbox", "segm"])\n')
    with answering(answers) as address:
        found = evaluated(config, address, capsys)
    expected = upstream_figures(config, predictions.samples)
    assert {"coco/bbox_mAP", "coco/segm_mAP_75"} <= set(expected)
    for key, value in expected.items():
        figure = found["figures"]["all"][key.removeprefix("coco/").replace("_", " ")]["served"]
        assert figure == (None if value < 0 else pytest.approx(100 * value)), key
    assert 5 < found["figures"]["all"]["segm mAP"]["served"] < 95
    classes = [found["figures"][name]["bbox mAP"]["served"] for name in ("circle", "square", "triangle")]
    assert sum(classes) / 3 == pytest.approx(found["figures"]["all"]["bbox mAP"]["served"], abs=0.11)


def test_voc_figures_are_upstreams_and_those_of_classes_give_their_mean(coco, capsys):
    folder, predictions = coco
    answers = predictions.answers
    config = write_config(folder, "fcos_sample.py", VOC)
    with answering(answers) as address:
        found = evaluated(config, address, capsys)
    expected = upstream_figures(config, predictions.samples)
    assert found["figures"]["all"]["mAP"]["served"] == pytest.approx(
        100 * expected["pascal_voc/mAP"], abs=1e-3
    )
    classes = [found["figures"][name]["AP75"]["served"] for name in ("circle", "square", "triangle")]
    assert sum(classes) / 3 == pytest.approx(100 * expected["pascal_voc/AP75"], abs=0.06)


def test_kitti_figures_are_upstreams(kitti, capsys):
    folder, predictions = kitti
    answers = predictions.answers
    config = write_config(folder, "second_sample.py")
    with answering(answers) as address:
        found = evaluated(config, address, capsys)
    figures = {
        (label, kind): value["served"]
        for label, kinds in found["figures"].items()
        for kind, value in kinds.items()
    }
    expected = upstream_figures(config, predictions.samples)
    assert len(expected) == len(figures) > 100
    for key, value in expected.items():
        label, _, kind = key.rpartition("KITTI/")[2].partition("_")
        assert figures["all" if label == "Overall" else label, kind.replace("_", " ")] == value
    assert 5 < figures["Car", "3D AP40 moderate strict"] < 95


def first_frames(folder: Path, kind: str, count: int) -> str:
    """Write an annotation file of the first validation frames alone; returns its path in the folder."""
    if kind == "kitti":
        whole = pickle.loads((folder / "kitti_infos_val.pkl").read_bytes())
        whole["data_list"] = whole["data_list"][:count]
        (folder / "first.pkl").write_bytes(pickle.dumps(whole))
        return "first.pkl"
    whole = json.loads((folder / "annotations" / "instances_val2017.json").read_text())
    whole["images"] = whole["images"][:count]
    ids = [image["id"] for image in whole["images"]]
    whole["annotations"] = [each for each in whole["annotations"] if each["image_id"] in ids]
    (folder / "annotations" / "first.json").write_text(json.dumps(whole))
    return "annotations/first.json"


@pytest.mark.parametrize("kind", ["coco", "kitti"])
def test_a_limit_gives_the_figures_of_a_data_set_of_the_first_frames(kind, request, capsys):
    folder, predictions = request.getfixturevalue(kind)
    config = write_config(folder, "fcos_sample.py" if kind == "coco" else "second_sample.py")
    alone = first_frames(folder, kind, 2)
    options = [f"test_dataloader.dataset.ann_file={alone}", f"test_evaluator.ann_file={folder / alone}"]
    with answering(predictions.answers) as address:
        limited = evaluated(config, address, capsys, "--limit", "2")
        first = evaluated(config, address, capsys, "--cfg-options", *options)
        whole = evaluated(config, address, capsys)
    assert (limited["frames"], whole["frames"]) == (2, made_predictions.FRAMES)
    assert limited["figures"] == first["figures"] != whole["figures"]


def test_frames_are_read_through_the_storage_of_the_data_set(coco, tmp_path, capsys):
    folder, predictions = coco
    answers = predictions.answers
    packed = tmp_path / "packed.ffr"
    pack_folder(folder, packed)
    data = shutil.copytree(folder, tmp_path / "data")
    for picture in (data / "val2017").iterdir():
        picture.unlink()
    prefix = f"{data}/"
    storage = f"dict(backend='ffrecord', fname={str(packed)!r}, path_mapping={{{prefix!r}: ''}})"
    text = (ASSETS / "fcos_sample.py").read_text()
    loader = 'dict(type="LoadImageFromFile")'
    assert text.count(loader) == 2
    config = data / "packed.py"
    config.write_text(text.replace(loader, f'dict(type="LoadImageFromFile", backend_args={storage})'))
    with answering(answers) as address:
        found = evaluated(config, address, capsys)
        assert (
            found["figures"] == evaluated(write_config(folder, "fcos_sample.py"), address, capsys)["figures"]
        )


def test_predictions_are_written_as_upstreams_programs_read_them(coco, tmp_path, capsys):
    from mmengine.evaluator import Evaluator
    from mmengine.fileio import load

    folder, predictions = coco
    answers = predictions.answers
    config = write_config(folder, "fcos_sample.py")
    with answering(answers) as address:
        found = evaluated(config, address, capsys, "--out", str(tmp_path / "served.pkl"))
    assert [path.name for path in tmp_path.iterdir()] == ["served.pkl"]
    data = open_data_set(data_settings(config))
    with upstream_session("mmdet"):
        evaluator = Evaluator([dict(metric) for metric in data.settings.metrics])
        evaluator.dataset_meta = data.dataset.metainfo
        again = evaluator.offline_evaluate(load(str(tmp_path / "served.pkl")))
    assert found["figures"]["all"]["bbox mAP"]["served"] == pytest.approx(100 * again["coco/bbox_mAP"])


@pytest.mark.parametrize(
    ("native", "served", "detections", "code"),
    [
        (40.5, 40.4, (9, 9), 0),  # one unit of upstream's rounding, more than 0.1 in floating point
        (40.5, 40.3, (9, 9), 1),
        (40.3, 40.5, (9, 9), 1),
        (0.0, 0.0, (0, 0), 3),
        (None, 40.5, (None, 9), 0),
        (None, None, (4, 9), 3),  # nothing was to find
        (None, 40.5, (4, 9), 3),
    ],
)
def test_the_exit_code_tells_a_loss_from_equality_and_from_nothing(native, served, detections, code):
    row = Row(None, "bbox mAP", native, served)
    assert _verdict(Evaluation((row, Row("circle", "bbox mAP", None, None)), 5, detections), 0.1) == code


@pytest.mark.slow
def test_an_archive_evaluates_as_native_does_and_a_loss_ends_with_code_1(demo_mar, kitti, capsys):
    folder, predictions = kitti
    answers = predictions.answers
    config = write_config(folder, "second_sample.py")
    native = ["--checkpoint", str(DEMO_CHECKPOINT), "--device", "cpu", "--limit", "3"]
    assert main(["evaluate", str(config), "--archive", str(demo_mar), *native]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["largest_difference"] < 0.1
    assert found["detections"]["native"] == found["detections"]["served"] > 0
    # Of other boxes than the model's, the same command says that the endpoint loses.
    lossy = copy.deepcopy(answers)
    for answer in lossy.values():
        for key in ("bboxes_3d", "scores_3d", "labels_3d", "names"):
            del answer[key][1:]
    with answering(lossy) as address:
        assert main(["evaluate", str(config), "--url", address, "--model", "made", *native]) == 1
    lost = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert lost["largest_difference"] > 5
    car = lost["figures"]["Car"]["3D AP40 moderate strict"]
    assert car["difference"] == pytest.approx(car["served"] - car["native"], abs=1e-3)
