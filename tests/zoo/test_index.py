"""`serve.zoo.index` on the index of the installed wheels, and on a small one made here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import zoo
from serve.errors import ModelLookupError
from serve.zoo import Zoo
from serve.zoo.aliases import ALIASES, RENAMED_WORDS, bare_name, name_words

SECOND = "second_hv_secfpn_8xb6-80e_kitti-3d-3class"
SECOND_CAR = "second_hv_secfpn_8xb6-80e_kitti-3d-car"
ENTRIES = zoo.list_models()


def test_alias_resolves_to_config_weights_and_hash() -> None:
    entry = zoo.resolve("second")
    assert entry.name == SECOND
    assert entry.package == "mmdet3d"
    assert entry.config_path.is_file()
    assert entry.weights_url is not None
    assert entry.weights_url.endswith(f"/{SECOND}-b086d0a3.pth")
    assert entry.sha256_prefix == "b086d0a3"
    assert "second" in entry.aliases
    assert zoo.require_weights_url(entry) == entry.weights_url


@pytest.mark.parametrize(("alias", "name"), sorted(ALIASES.items()))
def test_every_alias_resolves_to_an_installed_config(alias: str, name: str) -> None:
    entry = zoo.resolve(alias)
    assert entry.name == name
    assert entry.config_path.is_file()


@pytest.mark.parametrize("asked", ["Faster_RCNN", "faster_rcnn", "FASTER-RCNN", " faster-rcnn "])
def test_alias_resolves_in_any_spelling(asked: str) -> None:
    assert zoo.resolve(asked).name == "faster-rcnn_r50_fpn_1x_coco"


def test_every_name_resolves_to_itself() -> None:
    astray = [entry.name for entry in ENTRIES if zoo.resolve(entry.name, package=entry.package) != entry]
    assert len(ENTRIES) > 700
    assert astray == []


@pytest.mark.parametrize(
    ("former", "name"),
    [
        ("hv_second_secfpn_6x8_80e_kitti-3d-car", SECOND_CAR),
        ("configs/second/hv_second_secfpn_6x8_80e_kitti-3d-car.py", SECOND_CAR),
        ("hv_second_secfpn_6x8_80e_kitti-3d-car_20200620_230238-393f000c.pth", SECOND_CAR),
        ("hv_second_secfpn_fp16_6x8_80e_kitti-3d-car", "second_hv_secfpn_8xb6-amp-80e_kitti-3d-car"),
        ("faster_rcnn_r50_fpn_1x_coco", "faster-rcnn_r50_fpn_1x_coco"),
        ("configs/faster_rcnn/faster_rcnn_r50_fpn_1x_coco.py", "faster-rcnn_r50_fpn_1x_coco"),
        ("faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth", "faster-rcnn_r50_fpn_1x_coco"),
        ("configs/mask_rcnn_r50_fpn_1x_coco.py", "mask-rcnn_r50_fpn_1x_coco"),
        ("configs/cityscapes/mask_rcnn_r50_fpn_1x_cityscapes.py", "mask-rcnn_r50_fpn_1x_cityscapes"),
        ("mask_rcnn_r50_fpn_mstrain-poly_3x_coco", "mask-rcnn_r50_fpn_ms-poly-3x_coco"),
        ("retinanet_r50_fpn_fp16_1x_coco", "retinanet_r50_fpn_amp-1x_coco"),
        ("centernet_resnet18_140e_coco", "centernet_r18_8xb16-crop512-140e_coco"),
        (
            "hv_pointpillars_secfpn_6x8_160e_kitti-3d-3class",
            "pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class",
        ),
        (
            "centerpoint_02pillar_second_secfpn_circlenms_4x8_cyclic_20e_nus",
            "centerpoint_pillar02_second_secfpn_head-circlenms_8xb4-cyclic-20e_nus-3d",
        ),
        (
            "centerpoint_01voxel_second_secfpn_4x8_cyclic_20e_nus",
            "centerpoint_voxel01_second_secfpn_8xb4-cyclic-20e_nus-3d",
        ),
        ("3dssd_4x4_kitti-3d-car", "3dssd_4xb4_kitti-3d-car"),
        ("votenet_16x8_sunrgbd-3d-10class", "votenet_8xb16_sunrgbd-3d"),
        (
            "dv_mvx-fpn_second_secfpn_adamw_2x8_80e_kitti-3d-3class",
            "mvxnet_fpn_dv_second_secfpn_8xb2-80e_kitti-3d-3class",
        ),
        ("mmdet3d::second/second_hv_secfpn_8xb6-80e_kitti-3d-car.py", SECOND_CAR),
        (f"configs/second/{SECOND_CAR}.py", SECOND_CAR),
    ],
)
def test_former_name_resolves_to_present_name(former: str, name: str) -> None:
    assert zoo.resolve(former).name == name


def test_former_names_are_unique_except_a_few_shared_upstream() -> None:
    ambiguous = set()
    for entry in ENTRIES:
        for alias in entry.aliases:
            try:
                assert zoo.resolve(alias).name == entry.name
            except ModelLookupError as error:
                assert entry.name in str(error)
                ambiguous.add(alias)
    assert len(ambiguous) <= 5


def test_ambiguous_name_lists_candidates() -> None:
    with pytest.raises(ModelLookupError, match=r"area1, .*area6"):
        zoo.resolve("dgcnn_32x4_cosine_100e_s3dis_seg-3d-13class")


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("secnd", "second"), ("pointpilars", "pointpillars"), ("faster_rcn_r50_fpn_1x_coco", "faster-rcnn_r50")],
)
def test_unknown_name_suggests_similar_ones(asked: str, hint: str) -> None:
    with pytest.raises(ModelLookupError) as caught:
        zoo.resolve(asked)
    assert hint in str(caught.value)
    assert "mmdet3d-serve zoo" in str(caught.value)


@pytest.mark.parametrize(
    "asked", ["", "  ", "zzzz", "../..", "/", "a" * 5000, "\0", "no/such/config.py", "日本語"]
)
def test_nonsense_raises_lookup_error(asked: str) -> None:
    with pytest.raises(ModelLookupError):
        zoo.resolve(asked)


def test_package_argument_restricts_lookup() -> None:
    assert zoo.resolve("second", package="mmdet3d").name == SECOND
    with pytest.raises(ModelLookupError):
        zoo.resolve("second", package="mmdet")
    with pytest.raises(ModelLookupError, match="torchvision"):
        zoo.resolve("second", package="torchvision")


def test_model_without_published_weights_raises_lookup_error() -> None:
    entry = zoo.resolve("second-waymo")
    assert entry.weights_url is None
    with pytest.raises(ModelLookupError, match="second_hv_secfpn_sbn-all_16xb2"):
        zoo.require_weights_url(entry)


def test_folder_url_in_the_index_counts_as_no_weights() -> None:
    assert zoo.resolve("mask-rcnn_r50_caffe_fpn_1x_nuim").weights_url is None


def test_contradictory_index_uses_the_url_that_agrees_with_the_config() -> None:
    name = "pointpillars_hv_regnet-400mf_fpn_sbn-all_8xb4-2x_nus-3d"
    assert "hv_pointpillars_regnet-400mf_fpn_sbn-all" in zoo.require_weights_url(zoo.resolve(name))
    assert zoo.resolve("cylinder3d_8xb2-laser-polar-mix-3x_semantickitti").weights_url is None


def test_weights_in_the_old_box_frame_carry_a_note() -> None:
    assert any("1.0.0rc0" in note for note in zoo.resolve("second_hv_secfpn_8xb6-amp-80e_kitti-3d-car").notes)
    assert zoo.resolve("second").notes == ()


def test_list_models_filters_by_package_and_words() -> None:
    names = [entry.name for entry in zoo.list_models("mmdet3d", "second kitti car")]
    assert SECOND_CAR in names
    assert all("second" in name for name in names)
    assert {entry.package for entry in zoo.list_models("mmdet")} == {"mmdet"}
    assert zoo.list_models(query="no such thing") == []
    assert [entry.name for entry in zoo.list_models("mmdet")] == sorted(
        entry.name for entry in zoo.list_models("mmdet")
    )


def test_resolve_imports_neither_torch_nor_a_model_package() -> None:
    script = (
        "import sys; from serve import zoo; zoo.resolve('second');"
        "print(sorted({'torch', 'mmdet', 'mmdet3d', 'mmcv', 'mmengine', 'httpx'} & set(sys.modules)))"
    )
    root = Path(zoo.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- a small zoo ------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Zoo:
    root = tmp_path / "mim"
    for config in ("alpha/alpha_r50_8xb2-1x_coco", "alpha/alpha_r50_8xb2-2x_coco", "_base_/models/alpha_r50"):
        path = root / "configs" / f"{config}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("default_scope = 'mmdet'\n")
    (root / "model-index.yml").write_text(
        "Import:\n  - configs/alpha/metafile.yml\n  - configs/gone/metafile.yml\n"
    )
    (root / "configs/alpha/metafile.yml").write_text(
        """
Models:
  - Name: alpha_r50_8xb2-1x_coco
    Config: configs/alpha/alpha_r50_8xb2-1x_coco.py
    Weights: https://host/v2.0/alpha_r50_1x/alpha_r50_2x8_1x_coco_20200101-0badcafe.pth
  - Name: alpha_r50_8xb2-2x_coco
    Config: configs/alpha/alpha_r50_8xb2-2x_coco.py
    Weights: [https://host/one.pth, https://host/two.pth]
  - Name: alpha_r101_8xb2-1x_coco
    Config: configs/alpha/alpha_r101_8xb2-1x_coco.py
    Weights: https://host/v2.0/alpha_r101_2x8_1x_coco_20200101-0badcafe.pth
  - Config: nameless.py
"""
    )
    return Zoo({"mmdet": root})


def test_former_batch_and_gpu_order_resolves_both_ways(small: Zoo) -> None:
    for asked in (
        "alpha_r50_2x8_1x_coco",
        "alpha_r50_8x2_1x_coco",
        "alpha-r50-8xb2-1x-coco",
        "r50_alpha_coco_1x_8xb2",
    ):
        assert small.resolve(asked).sha256_prefix == "0badcafe"


def test_several_weight_files_count_as_no_weights(small: Zoo) -> None:
    assert small.resolve("alpha_r50_8xb2-2x_coco").weights_url is None


def test_entry_without_config_raises_lookup_error(small: Zoo) -> None:
    with pytest.raises(ModelLookupError, match=r"alpha_r101_8xb2-1x_coco.* wheel"):
        small.resolve("alpha_r101_8xb2-1x_coco")


def test_base_configs_are_not_listed(small: Zoo) -> None:
    assert [entry.name for entry in small.list_models()] == [
        "alpha_r50_8xb2-1x_coco",
        "alpha_r50_8xb2-2x_coco",
    ]


def test_missing_packages_raise_lookup_error() -> None:
    with pytest.raises(ModelLookupError, match="make setup"):
        Zoo({}).resolve("second")


# --- configs of one's own ---------------------------------------------------------------------------------


def test_copy_of_a_zoo_config_keeps_its_weights(small: Zoo, tmp_path: Path) -> None:
    original = small.resolve("alpha_r50_2x8_1x_coco")
    copy = tmp_path / original.config_path.name
    copy.write_bytes(original.config_path.read_bytes())
    found = small.resolve(copy)
    assert (found.config_path, found.weights_url) == (copy.resolve(), original.weights_url)
    copy.write_text("default_scope = 'mmdet'\nmodel = dict(changed=True)\n")
    assert small.resolve(str(copy)).weights_url is None


@pytest.mark.parametrize(
    ("text", "package"),
    [
        ("default_scope = 'mmdet3d'", "mmdet3d"),
        ("default_scope = 'mmdet'\npoint_cloud_range = [0]", "mmdet"),
        ("_base_ = ['mmdet3d::second/second.py']", "mmdet3d"),
        ("_base_ = 'base.py'", "mmdet3d"),
        ("_base_ = ['./base.py', 'other.py']", "mmdet3d"),
        ("point_cloud_range = [0, -40, -3, 70.4, 40, 1]", "mmdet3d"),
        ("from mmengine.config import read_base\nwith read_base():\n    from .base import *", "mmdet3d"),
        ("from mmdet.models import FasterRCNN", "mmdet"),
    ],
)
def test_package_of_own_config_is_detected_without_running_it(
    text: str, package: str, tmp_path: Path, small: Zoo
) -> None:
    (tmp_path / "base.py").write_text("_base_ = 'own.py'\ndefault_scope = 'mmdet3d'\n")
    config = tmp_path / "own.py"
    config.write_text(f"{text}\nopen(r'{tmp_path / 'ran'}', 'w')\n")
    entry = small.resolve(config)
    assert (entry.package, entry.name, entry.weights_url) == (package, "own", None)
    assert entry.notes
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["model = dict()", "this is not python", "\0"])
def test_own_config_without_package_counts_as_mmdets_like_upstream(
    text: str, tmp_path: Path, small: Zoo
) -> None:
    config = tmp_path / "own.py"
    config.write_text(text)
    assert small.resolve(config).package == "mmdet"
    assert small.resolve(config, package="mmdet3d").package == "mmdet3d"


# --- names ------------------------------------------------------------------------------------------------

WORDS = st.lists(st.from_regex(r"[a-z][a-z0-9]{0,6}", fullmatch=True), min_size=1, max_size=6)


@given(words=WORDS, separators=st.lists(st.sampled_from("-_"), min_size=6, max_size=6), data=st.data())
def test_name_words_ignore_order_and_separators(
    words: list[str], separators: list[str], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(words))
    joined = "".join(word + separator for word, separator in zip(shuffled, separators, strict=False)).rstrip(
        "-_"
    )
    assert name_words(joined) == name_words("_".join(words))


@given(gpus=st.integers(1, 64), batch=st.integers(1, 64))
def test_gpus_and_batch_are_one_word_in_every_order(gpus: int, batch: int) -> None:
    assert (
        name_words(f"a_{gpus}xb{batch}") == name_words(f"a_{batch}x{gpus}") == name_words(f"a-{gpus}x{batch}")
    )


@pytest.mark.parametrize(("old", "new"), sorted(RENAMED_WORDS.items()))
def test_renamed_words_compare_equal(old: str, new: tuple[str, ...]) -> None:
    assert name_words(f"x_{old}") == name_words("_".join(("x", *new)))


@given(st.text(max_size=60))
def test_bare_name_accepts_any_text(text: str) -> None:
    assert "/" not in bare_name(text)
