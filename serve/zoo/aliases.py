"""Short names of popular models, and the rules by which former model names are recognised.

`serve.zoo.index` looks up configs and weights.
"""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

__all__ = ["ADDED_WORDS", "ALIASES", "RENAMED_WORDS", "bare_name", "flat_name", "name_words"]

_TAIL = re.compile(r"(_bbox_mAP.*)?(_?\d{8}pth)?([-_]\d{8}([-_]\d{6})?)?(-[0-9a-f]{8})?$")
_BATCH = re.compile(r"(\d+)xb?(\d+)")

_R50 = "r50_fpn_1x_coco"
_NUS = "8xb4-cyclic-20e_nus-3d"

ALIASES: dict[str, str] = {
    # LiDAR detection
    "second": "second_hv_secfpn_8xb6-80e_kitti-3d-3class",
    "second-car": "second_hv_secfpn_8xb6-80e_kitti-3d-car",
    "second-waymo": "second_hv_secfpn_sbn-all_16xb2-2x_waymoD5-3d-3class",
    "pointpillars": "pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class",
    "pointpillars-car": "pointpillars_hv_secfpn_8xb6-160e_kitti-3d-car",
    "pointpillars-nuscenes": "pointpillars_hv_secfpn_sbn-all_8xb4-2x_nus-3d",
    "pointpillars-lyft": "pointpillars_hv_secfpn_sbn-all_8xb2-2x_lyft-3d",
    "pointpillars-waymo": "pointpillars_hv_secfpn_sbn-all_16xb2-2x_waymoD5-3d-3class",
    "centerpoint": f"centerpoint_voxel01_second_secfpn_head-circlenms_{_NUS}",
    "centerpoint-voxel": f"centerpoint_voxel01_second_secfpn_head-circlenms_{_NUS}",
    "centerpoint-pillar": f"centerpoint_pillar02_second_secfpn_head-circlenms_{_NUS}",
    "ssn": "ssn_hv_secfpn_sbn-all_16xb2-2x_nus-3d",
    "3dssd": "3dssd_4xb4_kitti-3d-car",
    "parta2": "parta2_hv_secfpn_8xb2-cyclic-80e_kitti-3d-3class",
    "part-a2": "parta2_hv_secfpn_8xb2-cyclic-80e_kitti-3d-3class",
    "pv-rcnn": "pv_rcnn_8xb2-80e_kitti-3d-3class",
    "point-rcnn": "point-rcnn_8xb2_kitti-3d-3class",
    "sassd": "sassd_8xb6-80e_kitti-3d-3class",
    "mvxnet": "mvxnet_fpn_dv_second_secfpn_8xb2-80e_kitti-3d-3class",
    # indoor
    "votenet": "votenet_8xb8_scannet-3d",
    "votenet-sunrgbd": "votenet_8xb16_sunrgbd-3d",
    "imvotenet": "imvotenet_stage2_8xb16_sunrgbd-3d",
    "h3dnet": "h3dnet_8xb3_scannet-seg",
    "groupfree3d": "groupfree3d_head-L6-O256_4xb8_scannet-seg",
    "fcaf3d": "fcaf3d_2xb8_scannet-3d-18class",
    # cameras
    "fcos3d": "fcos3d_r101-caffe-dcn_fpn_head-gn_8xb2-1x_nus-mono3d",
    "pgd": "pgd_r101-caffe_fpn_head-gn_4xb3-4x_kitti-mono3d",
    "smoke": "smoke_dla34_dlaneck_gn-all_4xb8-6x_kitti-mono3d",
    "imvoxelnet": "imvoxelnet_8xb4_kitti-3d-car",
    # point segmentation
    "cylinder3d": "cylinder3d_4xb4-3x_semantickitti",
    "minkunet": "minkunet18_w32_torchsparse_8xb2-amp-15e_semantickitti",
    "spvcnn": "spvcnn_w32_8xb2-amp-15e_semantickitti",
    "pointnet2": "pointnet2_ssg_2xb16-cosine-200e_scannet-seg",
    "paconv": "paconv_ssg_8xb8-cosine-150e_s3dis-seg",
    "dgcnn": "dgcnn_4xb32-cosine-100e_s3dis-seg_test-area5",
    # images: two-stage
    "faster-rcnn": f"faster-rcnn_{_R50}",
    "fast-rcnn": f"fast-rcnn_{_R50}",
    "mask-rcnn": f"mask-rcnn_{_R50}",
    "cascade-rcnn": f"cascade-rcnn_{_R50}",
    "cascade-mask-rcnn": f"cascade-mask-rcnn_{_R50}",
    "htc": f"htc_{_R50}",
    "sparse-rcnn": f"sparse-rcnn_{_R50}",
    "queryinst": f"queryinst_{_R50}",
    "mask-rcnn-swin": "mask-rcnn_swin-t-p4-w7_fpn_1x_coco",
    # images: one-stage
    "retinanet": f"retinanet_{_R50}",
    "fcos": "fcos_r50-caffe_fpn_gn-head_1x_coco",
    "atss": f"atss_{_R50}",
    "gfl": f"gfl_{_R50}",
    "paa": f"paa_{_R50}",
    "tood": f"tood_{_R50}",
    "vfnet": f"vfnet_{_R50}",
    "ssd": "ssd300_coco",
    "ssd300": "ssd300_coco",
    "ssd512": "ssd512_coco",
    "yolov3": "yolov3_d53_8xb8-ms-608-273e_coco",
    "yolof": "yolof_r50-c5_8xb8-1x_coco",
    "yolact": "yolact_r50_1xb8-55e_coco",
    "yolox": "yolox_s_8xb8-300e_coco",
    "yolox-tiny": "yolox_tiny_8xb8-300e_coco",
    "yolox-s": "yolox_s_8xb8-300e_coco",
    "yolox-l": "yolox_l_8xb8-300e_coco",
    "yolox-x": "yolox_x_8xb8-300e_coco",
    "rtmdet": "rtmdet_s_8xb32-300e_coco",
    "rtmdet-tiny": "rtmdet_tiny_8xb32-300e_coco",
    "rtmdet-s": "rtmdet_s_8xb32-300e_coco",
    "rtmdet-m": "rtmdet_m_8xb32-300e_coco",
    "rtmdet-l": "rtmdet_l_8xb32-300e_coco",
    "rtmdet-x": "rtmdet_x_8xb32-300e_coco",
    "rtmdet-ins": "rtmdet-ins_s_8xb32-300e_coco",
    "centernet": "centernet_r18_8xb16-crop512-140e_coco",
    "cornernet": "cornernet_hourglass104_8xb6-210e-mstest_coco",
    "solov2": "solov2_r50_fpn_1x_coco",
    "condinst": "condinst_r50_fpn_ms-poly-90k_coco_instance",
    # images: transformers
    "detr": "detr_r50_8xb2-150e_coco",
    "conditional-detr": "conditional-detr_r50_8xb2-50e_coco",
    "dab-detr": "dab-detr_r50_8xb2-50e_coco",
    "deformable-detr": "deformable-detr_r50_16xb2-50e_coco",
    "dino": "dino-4scale_r50_8xb2-12e_coco",
    "mask2former": "mask2former_r50_8xb2-lsj-50e_coco",
}
"""Short name → config name (the file name without ``.py``)."""

RENAMED_WORDS: dict[str, tuple[str, ...]] = {
    "fp16": ("amp",),
    "mstrain": ("ms",),
    "pretrain": ("pre",),
    "resnet18": ("r18",),
    "resnet50": ("r50",),
    "resnet101": ("r101",),
    "01voxel": ("voxel01",),
    "0075voxel": ("voxel0075",),
    "02pillar": ("pillar02",),
    "crpn": ("cascade", "rpn"),
}
"""Words of names before mmdet 3 / mmdet3d 1.1, and their replacements."""

ADDED_WORDS = frozenset({"3d", "head"})
"""Words of present names that former names often lack."""


def bare_name(name: str) -> str:
    """Strip folders, ``.py`` or ``.pth``, and the suffixes of weight files (date, score, hash).

    Args:
        name: a model name, path, file name or URL.
    """
    path = unquote(urlsplit(name).path) if "://" in name else name
    base = path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    if base.endswith(".pth"):
        return _TAIL.sub("", base.removesuffix(".pth"))
    return base.removesuffix(".py")


def flat_name(name: str) -> str:
    """Lower-case name without the separators ``-`` and ``_``, which upstream exchanged freely."""
    return re.sub(r"[-_]", "", name.lower())


def name_words(name: str, *, without: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Words of a name in their present form, sorted, so that reordered names compare equal.

    ``6x8`` (samples per GPU, GPUs), ``8x6`` and ``8xb6`` (GPUs, samples per GPU) are the same word: both orders
    were in use at the same time.

    Args:
        name: see `bare_name`.
        without: words to omit.
    """
    words: list[str] = []
    for word in re.split(r"[-_]+", bare_name(name).lower()):
        if batch := _BATCH.fullmatch(word):
            words.append("x".join(sorted(batch.groups(), key=int)))
        elif word:
            words.extend(RENAMED_WORDS.get(word, (word,)))
    return tuple(sorted(word for word in words if word not in without))
