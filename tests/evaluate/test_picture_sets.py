"""Figures on pictures in the layouts of Pascal VOC, Cityscapes and nuImages are upstream's of the same predictions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serve.cli.main import main
from serve.synthetic.cityscapes import write_cityscapes
from serve.synthetic.coco import SHAPES, draw_picture
from serve.synthetic.nuimages import write_nuimages
from serve.synthetic.voc import write_voc
from tests.conftest import ASSETS
from tests.evaluate import made_predictions
from tests.evaluate.answering import answering
from tests.evaluate.test_evaluation import upstream_figures

pytestmark = pytest.mark.slow


def with_config(folder: Path, name: str) -> Path:
    for file in ("fcos_sample.py", f"{name}_sample.py"):
        (folder / file).write_bytes((ASSETS / file).read_bytes())
    return folder / f"{name}_sample.py"


def run_tool(*arguments: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "serve", "tools", *arguments], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


def evaluated(config: Path, answers: dict, capsys, *options: str) -> dict:
    with answering(answers) as address:
        assert main(["evaluate", str(config), "--url", address, "--model", "made", *options]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]


def test_pascal_voc(tmp_path, capsys):
    made = made_predictions.pictures(tmp_path / "voc", write_voc, "VOC2007/JPEGImages/*", SHAPES)
    config = with_config(tmp_path / "voc", "voc")
    config.write_text(config.read_text().replace('metric="mAP"', 'metric="mAP", iou_thrs=[0.5, 0.75]'))
    figures = evaluated(config, made.answers, capsys)
    expected = upstream_figures(config, made.samples)
    assert figures["all"]["mAP"]["served"] == pytest.approx(100 * expected["pascal_voc/mAP"], abs=1e-3)
    assert 5 < figures["all"]["mAP"]["served"] < 95
    of_classes = [figures[name]["AP75"]["served"] for name in SHAPES]
    assert sum(of_classes) / 3 == pytest.approx(100 * expected["pascal_voc/AP75"], abs=0.06)


def test_cityscapes(tmp_path, capsys):
    pytest.importorskip("cityscapesscripts", reason="Cityscapes' scripts come with `make setup-train`")
    names = ("person", "rider", "car")
    made = made_predictions.pictures(tmp_path / "city", write_cityscapes, "leftImg8bit/val/*/*.png", names)
    config = with_config(tmp_path / "city", "cityscapes")
    before = sorted(tmp_path.rglob("*"))
    figures = evaluated(config, made.answers, capsys)
    assert sorted(tmp_path.rglob("*")) == before
    expected = upstream_figures(config, made.samples)
    for kind in ("mAP", "AP@50"):
        value = 100 * expected[f"cityscapes/{kind}"]
        assert figures["all"][f"mask {kind}"]["served"] == pytest.approx(value, abs=1e-3)
        of_classes = [figures[name][f"mask {kind}"]["served"] for name in names]
        assert np.mean(of_classes) == pytest.approx(value, abs=1e-3)
    assert 5 < figures["all"]["mask mAP"]["served"] < 95
    assert figures["all"]["segm mAP"]["served"] == pytest.approx(100 * expected["coco/segm_mAP"])


def test_the_annotations_of_cityscapes_are_those_of_upstreams_converter(tmp_path):
    pytest.importorskip("cityscapesscripts", reason="Cityscapes' scripts come with `make setup-train`")
    write_cityscapes(tmp_path / "city", train=2, val=1)
    run_tool("cityscapes", str(tmp_path / "city"), "--out-dir", str(tmp_path / "made"))
    for split in ("train", "val"):
        name = f"instancesonly_filtered_gtFine_{split}.json"
        mine, theirs = (
            json.loads((folder / name).read_text())
            for folder in (tmp_path / "city" / "annotations", tmp_path / "made")
        )
        assert sorted(theirs["images"], key=lambda one: one["file_name"]) == [
            {**one, "id": other["id"]} for one, other in zip(
                mine["images"], sorted(theirs["images"], key=lambda one: one["file_name"]), strict=True)
        ]  # fmt: skip
        keys = ("category_id", "bbox", "area", "segmentation", "iscrowd")
        found = [
            sorted(
                json.dumps({key: one[key] for key in keys}, sort_keys=True) for one in content["annotations"]
            )
            for content in (mine, theirs)
        ]
        assert found[0] == found[1]


def test_nuimages_by_way_of_upstreams_converter(tmp_path, capsys):
    pytest.importorskip("nuimages", reason="nuImages' development kit comes with `make setup-train`")
    folder = tmp_path / "nuimages"
    names = ("car", "pedestrian", "traffic_cone")
    made = made_predictions.pictures(folder, write_nuimages, "samples/CAM_FRONT/*.jpg", names)
    config = with_config(folder, "nuimages")
    arguments = ["--data-root", str(folder), "--version", "v1.0-train", "v1.0-val", "--nproc", "1"]
    run_tool("nuimage_converter", *arguments, "--out-dir", f"{folder}/annotations/")
    content = json.loads((folder / "annotations" / "nuimages_v1.0-val.json").read_text())
    drawn = [draw_picture(1_000_000 + index) for index in range(made_predictions.FRAMES)]
    assert len(content["annotations"]) == sum(len(picture.labels) for picture in drawn)
    figures = evaluated(config, made.answers, capsys)
    expected = upstream_figures(config, made.samples)
    assert figures["all"]["bbox mAP"]["served"] == pytest.approx(100 * expected["coco/bbox_mAP"])
    assert 5 < figures["car"]["bbox mAP"]["served"] < 95


@pytest.mark.parametrize("prefix", ["no/such/gtFine"])
def test_a_missing_truth_of_cityscapes_is_named(prefix, tmp_path, capsys):
    write_cityscapes(tmp_path / "city", train=1, val=1)
    config = with_config(tmp_path / "city", "cityscapes")
    text = config.read_text().replace('data_root + "gtFine/val"', repr(prefix))
    config.write_text(text)
    assert main(["evaluate", str(config), "--model", "made"]) == 2
    assert prefix in capsys.readouterr().err
