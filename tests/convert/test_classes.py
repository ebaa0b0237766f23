"""Class names come as upstream takes them, and fit the head."""

from __future__ import annotations

import pytest

from serve.convert.classes import check_against_head, find_class_names, head_class_count, read_class_names
from serve.errors import ArchiveError


def config(metainfo: dict | None = None, *, dataset: str | None = None, **more: object) -> dict:
    data: dict = {"pipeline": [{"type": "LoadImageFromFile"}]}
    if dataset:
        data["type"] = dataset
    if metainfo is not None:
        data["metainfo"] = metainfo
    return {"default_scope": "mmdet", "model": {}, "test_dataloader": {"dataset": data}, **more}


def head(count: int) -> dict:
    return {"type": "FCOS", "bbox_head": {"type": "FCOSHead", "num_classes": count}}


@pytest.mark.parametrize("key", ["classes", "CLASSES"])
def test_both_spellings_of_metainfo_are_read(key):
    assert find_class_names(config({key: ("cat", "dog")})).names == ("cat", "dog")


def test_a_file_of_names_is_read_line_by_line(tmp_path):
    (tmp_path / "classes.txt").write_text("traffic light\nfire hydrant\n\n")
    found = find_class_names(config({"classes": str(tmp_path / "classes.txt")}))
    assert found.names == ("traffic light", "fire hydrant")


def test_a_path_that_is_no_file_is_refused_and_never_spelled_out(tmp_path):
    with pytest.raises(ArchiveError, match=r"none\.txt"):
        find_class_names(config({"classes": str(tmp_path / "none.txt")}))


@pytest.mark.parametrize("kind", [set, frozenset])
def test_a_set_of_names_is_refused_for_it_has_no_order(kind):
    with pytest.raises(ArchiveError, match="order"):
        find_class_names(config({"classes": kind(("cat", "dog"))}))


def test_what_the_user_says_goes_before_the_checkpoint_and_that_before_the_config():
    described = config({"classes": ("from config",)})
    assert find_class_names(described, ("from checkpoint",), ("from user",)).names == ("from user",)
    assert find_class_names(described, ("from checkpoint",)).names == ("from checkpoint",)
    assert find_class_names(described).names == ("from config",)


def test_another_number_of_names_than_classes_is_refused_with_both_and_their_source():
    named = find_class_names(config(dataset="CocoDataset"))
    with pytest.raises(ArchiveError, match=r"2 classes.*CocoDataset.*80.*--classes"):
        check_against_head(named, head(2))
    check_against_head(named, head(80))


@pytest.mark.parametrize(
    "given", [{"config": True}, {"checkpoint": ("cat", "cat")}, {"given": ("cat", "cat")}]
)
def test_one_name_for_two_classes_is_refused_with_both_labels(given):
    described = config({"classes": ["cat", "cat"]} if given.pop("config", None) else None)
    with pytest.raises(ArchiveError, match=r"'cat' twice, as label 0 and 1.*--classes"):
        check_against_head(find_class_names(described, **given), head(2))


@pytest.mark.parametrize("blank", ["", " "])
def test_a_blank_name_is_refused_with_its_label(blank):
    with pytest.raises(ArchiveError, match=r"label 1 no name.*--classes"):
        check_against_head(find_class_names(config({"classes": ["cat", blank]})), head(2))


def test_no_names_at_all_are_refused():
    with pytest.raises(ArchiveError, match="--classes"):
        check_against_head(find_class_names(config()), head(2))


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (head(7), 7),
        (
            {
                "roi_head": {"bbox_head": [{"num_classes": 5}, {"num_classes": 5}]},
                "rpn_head": {"num_classes": 1},
            },
            5,
        ),
        ({"pts_bbox_head": {"tasks": [{"num_class": 1}, {"num_class": 2}]}}, 3),
        ({"panoptic_fusion_head": {"num_things_classes": 80, "num_stuff_classes": 53}}, 133),
        ({"detector": head(4), "type": "SoftTeacher"}, 4),
        ({"type": "RPN", "rpn_head": {}}, None),
    ],
)
def test_the_number_of_classes_is_read_from_the_head(model, count):
    assert head_class_count(model) == count


def test_a_segmentor_may_leave_its_ignored_class_unnamed():
    names = find_class_names(config({"classes": ("road", "tree")}))
    check_against_head(names, {"decode_head": {"num_classes": 3}})
    with pytest.raises(ArchiveError):
        check_against_head(names, {"decode_head": {"num_classes": 4}})


def test_the_option_takes_names_or_a_file(tmp_path):
    (tmp_path / "names").write_text("cat\ndog\n")
    assert read_class_names("cat, dog") == read_class_names(str(tmp_path / "names")) == ("cat", "dog")
    for wrong in ("", "cat,cat"):
        with pytest.raises(ArchiveError):
            read_class_names(wrong)


@pytest.mark.parametrize(
    "named",
    [["cat", "dog"], ("cat", "dog"), {0: "cat", 1: "dog"}, {1: "dog", 0: "cat"}, {"cat": 0, "dog": 1}],
)
def test_names_come_in_the_order_of_their_labels(named):
    assert find_class_names(config({"classes": named})).names == ("cat", "dog")


@pytest.mark.parametrize(
    "named", [2, 2.5, {1: "cat", 2: "dog"}, {"cat": 1, "dog": 0}, [("cat", 1)], ["cat", None], {"cat": "x"}]
)
def test_names_in_another_form_are_refused_and_never_guessed(named):
    with pytest.raises(ArchiveError, match="--classes"):
        find_class_names(config({"classes": named}))


def test_of_both_spellings_the_later_one_counts_as_upstream_does():
    inherited = {"classes": tuple(map(str, range(80))), "CLASSES": ("cat", "dog")}
    assert find_class_names(config(inherited)).names == ("cat", "dog")
