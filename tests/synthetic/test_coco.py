"""The data set in COCO's layout: what pycocotools reads is what the pictures hold."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from serve.synthetic.coco import SHAPES, draw_picture, write_coco

TRAIN, VAL = 12, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("coco") / "data"
    write_coco(path, train=TRAIN, val=VAL)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_arguments_write_the_same_files(folder, tmp_path):
    write_coco(tmp_path / "again", train=TRAIN, val=VAL)
    assert files(tmp_path / "again") == files(folder)


def test_no_validation_picture_is_a_training_picture(folder):
    pictures = [path.read_bytes() for path in folder.rglob("*.jpg")]
    assert len(set(pictures)) == len(pictures) == TRAIN + VAL


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools 2.0.11 on numpy 2
def test_polygons_and_boxes_are_those_of_the_visible_parts(folder, capsys):
    coco = COCO(str(folder / "annotations" / "instances_train2017.json"))
    for index, image_id in enumerate(coco.getImgIds()):
        picture = draw_picture(index)
        found = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        assert [each["category_id"] - 1 for each in found] == list(picture.labels)
        for each, mask in zip(found, picture.masks, strict=True):
            x, y, width, height = each["bbox"]
            assert mask[y : y + height, x : x + width].sum() == mask.sum() == each["area"]
            drawn = coco.annToMask(each).astype(bool)
            assert (drawn & mask).sum() / (drawn | mask).sum() > 0.7


def test_every_class_occurs_and_is_named(folder, capsys):
    coco = COCO(str(folder / "annotations" / "instances_train2017.json"))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(SHAPES)
    assert all(coco.getAnnIds(catIds=[category]) for category in coco.getCatIds())


def test_shapes_differ_from_what_is_behind(folder):
    for seed in range(5):
        picture = draw_picture(seed)
        for mask in picture.masks:
            around = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7))).astype(bool) & ~picture.masks.any(
                axis=0
            )
            if around.sum() > 20:
                apart = picture.image[mask].mean(axis=0) - picture.image[around].mean(axis=0)
                assert np.abs(apart).max() > 15
