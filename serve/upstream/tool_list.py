"""Upstream's programs in the installed wheels (``.mim/tools``), and what each does."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from serve import zoo
from serve.errors import ModelLookupError, SettingsError

__all__ = ["Tool", "all_tools", "find_tool", "package_of_arguments"]

_ANALYSIS, _DATA, _MODELS, _MISC = (
    "analysis_tools",
    "dataset_converters",
    "model_converters",
    "misc",
)
SUMMARIES: dict[str, str] = {
    "train": "train a detector",
    "test": "test a detector on a data set",
    "test_tracking": "test a tracker on a data set",
    f"{_ANALYSIS}/analyze_logs": "plot losses and metrics of training logs, average seconds per iteration",
    f"{_ANALYSIS}/analyze_results": "draw the best and worst pictures of a result file",
    f"{_ANALYSIS}/benchmark": "measure frames per second",
    f"{_ANALYSIS}/browse_dataset": "draw what the training pipeline makes of a data set",
    f"{_ANALYSIS}/coco_error_analysis": "plot COCO's precision by kind of error",
    f"{_ANALYSIS}/coco_occluded_separated_recall": "recall of occluded and separated COCO masks",
    f"{_ANALYSIS}/confusion_matrix": "plot the confusion matrix of a result file",
    f"{_ANALYSIS}/eval_metric": "metrics of a result file (test --out)",
    f"{_ANALYSIS}/fuse_results": "fuse several COCO result files",
    f"{_ANALYSIS}/get_flops": "parameters and operations of a network, per part",
    f"{_ANALYSIS}/optimize_anchors": "find YOLO's anchors for a data set",
    f"{_ANALYSIS}/robustness_eval": "summarise the results of test_robustness",
    f"{_ANALYSIS}/test_robustness": "test a detector on corrupted pictures",
    f"{_ANALYSIS}/mot/browse_dataset": "draw a tracking data set",
    f"{_ANALYSIS}/mot/mot_error_visualize": "draw the errors of a tracker",
    f"{_ANALYSIS}/mot/mot_param_search": "search the parameters of a tracker",
    f"{_DATA}/ade20k2coco": "ADE20K to COCO's format",
    f"{_DATA}/cityscapes": "Cityscapes to COCO's format",
    f"{_DATA}/coco_stuff164k": "masks of COCO-Stuff 164k",
    f"{_DATA}/crowdhuman2coco": "CrowdHuman to COCO's format",
    f"{_DATA}/images2coco": "a folder of pictures to a COCO file without annotations",
    f"{_DATA}/lyft_data_fixer": "mend a broken file of Lyft's data set",
    f"{_DATA}/mot2coco": "MOT to COCO's video format",
    f"{_DATA}/mot2reid": "MOT to a re-identification data set",
    f"{_DATA}/nuimage_converter": "nuImages to COCO's format",
    f"{_DATA}/pascal_voc": "Pascal VOC to COCO's format",
    f"{_DATA}/prepare_coco_semantic_annos_from_panoptic_annos": "semantic masks of COCO panoptic",
    f"{_DATA}/update_infos_to_v2": "info files of mmdet3d before 1.1 to today's form",
    f"{_DATA}/youtubevis2coco": "YouTube-VIS to COCO's video format",
    "create_data": "info files of KITTI, nuScenes, Lyft, Waymo, ScanNet, S3DIS, SUN RGB-D, SemanticKITTI",
    "update_data_coords": "info files of mmdet3d before 1.0 to today's box frames",
    f"{_MISC}/browse_dataset": "draw what the training pipeline makes of a 3D data set",
    f"{_MISC}/download_dataset": "download COCO, LVIS, VOC, ADE20K and others",
    f"{_MISC}/fuse_conv_bn": "fuse convolutions and batch norms of a checkpoint",
    f"{_MISC}/gen_coco_panoptic_test_info": "annotation file of COCO panoptic's test pictures",
    f"{_MISC}/get_crowdhuman_id_hw": "names and sizes of CrowdHuman's pictures",
    f"{_MISC}/get_image_metas": "sizes of a data set's pictures",
    f"{_MISC}/print_config": "print a config with its bases",
    f"{_MISC}/split_coco": "split COCO for semi-supervised training",
    f"{_MISC}/visualize_results": "draw a result file in 3D (needs a display)",
    f"{_MODELS}/convert_h3dnet_checkpoints": "H3DNet's checkpoints before mmdet3d 0.6",
    f"{_MODELS}/convert_votenet_checkpoints": "VoteNet's checkpoints before mmdet3d 0.6",
    f"{_MODELS}/detectron2_to_mmdet": "checkpoints of Detectron2",
    f"{_MODELS}/detectron2pytorch": "ResNets of Detectron (Caffe2)",
    f"{_MODELS}/detic_to_mmdet": "checkpoints of Detic",
    f"{_MODELS}/glip_to_mmdet": "checkpoints of GLIP",
    f"{_MODELS}/groundingdino_to_mmdet": "checkpoints of Grounding DINO",
    f"{_MODELS}/publish_model": "keep the weights of a checkpoint, name the file by its hash",
    f"{_MODELS}/regnet2mmdet": "RegNets of pycls",
    f"{_MODELS}/selfsup2mmdet": "MoCo's and SwAV's backbones",
    f"{_MODELS}/swinv1_to_mmdet": "Swin transformers of version 1",
    f"{_MODELS}/upgrade_model_version": "checkpoints of mmdet 1.x",
    f"{_MODELS}/upgrade_ssd_version": "SSD's checkpoints of mmdet 2.x",
}
"""Path below ``tools/`` without ``.py`` → summary. What a program imports only is not listed."""

_PACKAGES = ("mmdet", "mmdet3d")
# Names of mmdet 2.x and mmdet3d 0.x.
_RENAMED = {"detectron2pytorch": f"{_MODELS}/detectron2pytorch", "print_config": f"{_MISC}/print_config"}


@dataclass(frozen=True)
class Tool:
    """One program of upstream.

    Attributes:
        name: path below ``tools/`` without ``.py``.
        packages: those whose wheel has it, ``mmdet`` first.
        summary: one line.
    """

    name: str
    packages: tuple[str, ...]
    summary: str

    @property
    def short_name(self) -> str:
        """Name of the file without ``.py``."""
        return PurePosixPath(self.name).name

    def path(self, package: str) -> Path:
        """File of the program in the installed wheel of `package`."""
        return tools_folder(package) / f"{self.name}.py"


def tools_folder(package: str) -> Path:
    """Folder ``tools`` in the installed wheel of `package`.

    Raises:
        ModelLookupError: the package is not installed.
    """
    roots = zoo.installed_roots()
    if package not in roots:
        raise ModelLookupError(f"{package} is not installed; run `make setup`")
    return roots[package] / "tools"


def all_tools() -> Iterator[Tool]:
    """Programs of the installed wheels, in the order of `SUMMARIES`."""
    roots = zoo.installed_roots()
    for name, summary in SUMMARIES.items():
        packages = tuple(
            package
            for package in _PACKAGES
            if (roots.get(package, Path()) / "tools" / f"{name}.py").is_file()
        )
        if packages:
            yield Tool(name, packages, summary)


def find_tool(name: str, package: str | None = None) -> Tool:
    """Find a program by its name, or its path below ``tools/``, with or without ``.py``.

    Args:
        name: as the user gives it.
        package: chooses among programs of the same name.

    Raises:
        SettingsError: no program, or more than one, has that name.
    """
    wanted = _path_below_tools(name)
    known = list(all_tools())
    found = [tool for tool in known if tool.name in (wanted, _RENAMED.get(wanted))]
    if not found and "/" in wanted:
        found = [tool for tool in known if tool.name.endswith(f"/{wanted}")]
    if not found:
        found = [tool for tool in known if tool.short_name == PurePosixPath(wanted).name]
        if len(found) > 1:  # of browse_dataset the one for detectors
            found = [tool for tool in found if "/mot/" not in tool.name]
            found = [tool for tool in found if (package or _PACKAGES[0]) in tool.packages] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise SettingsError(f"'{name}' is ambiguous; use one of {', '.join(tool.name for tool in found)}")
    near = difflib.get_close_matches(wanted, [tool.short_name for tool in known], n=3)
    hint = f"; similar: {', '.join(near)}" if near else ""
    raise SettingsError(f"no tool is called '{name}'{hint}; `mmdet3d-serve tools` lists all")


def _path_below_tools(name: str) -> str:
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in (".", "/")]
    if "tools" in parts:
        parts = parts[len(parts) - parts[::-1].index("tools") :]
    return "/".join(parts).removesuffix(".py")


def package_of_arguments(arguments: Sequence[str]) -> str | None:
    """Package of the first argument that is a config or a model of the zoo; None if there is none."""
    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            return zoo.resolve(argument).package
        except ModelLookupError:
            continue
    return None
