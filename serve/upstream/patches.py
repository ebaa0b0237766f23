"""Corrections of mmengine, mmdet and mmdet3d for the present torch and numpy, with upstream's issue if there is one.

`apply` corrects modules that are imported already, and the others when they are imported. Kernels and what they need
are corrected by `serve.ops.patches`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from serve import ops
from serve.ops.patches import ModuleOverlay, PatchingLoader
from serve.upstream import former_calls
from serve.upstream.missing_packages import PACKAGES, stand_in

__all__ = ["apply"]


def _init_processes(module: ModuleType) -> None:
    """Start process groups on machines without CUDA, where upstream selects a GPU even for gloo.

    A port in ``env_cfg.dist_cfg`` is for Slurm: torchrun has its own, and upstream stops at the argument.
    """
    torch = module.__dict__["torch"]
    has_cuda = torch.cuda.is_available()
    if not has_cuda:
        # Slurm's processes are numbered by it where SLURM_LOCALID is not set.
        cuda = ModuleOverlay(torch.cuda, set_device=lambda device: None, device_count=lambda: 1)
        module.__dict__["torch"] = ModuleOverlay(torch, cuda=cuda)
    start = module.__dict__["init_dist"]

    def init_dist(launcher: str, backend: str = "nccl", *args: Any, **named: Any) -> None:
        """Initialize the process group; NCCL needs GPUs, gloo does not."""
        if launcher != "slurm":
            named.pop("port", None)
        start(launcher, "gloo" if backend == "nccl" and not has_cuda else backend, *args, **named)

    module.__dict__["init_dist"] = init_dist


def _wrap_on_cpu(module: ModuleType) -> None:
    """Wrap models on the CPU: DistributedDataParallel takes no device ids for them."""
    wrapper = module.__dict__["MMDistributedDataParallel"]
    initialize = wrapper.__init__

    def __init__(self: Any, module: Any, *args: Any, **named: Any) -> None:
        if next(module.parameters()).device.type == "cpu":
            named.pop("device_ids", None)
        initialize(self, module, *args, **named)

    wrapper.__init__ = __init__


def _read_checkpoints_as_data(module: ModuleType) -> None:
    """Read what upstream's own training writes, which torch 2.6 refuses (mmengine#1655)."""
    from serve.upstream.checkpoints import load_whole_checkpoint

    module.__dict__["torch"] = ModuleOverlay(module.__dict__["torch"], load=load_whole_checkpoint)


def _find_in1d(module: ModuleType) -> None:
    """Give ScanNet's and Cityscapes' instance metrics `numpy.in1d`, which numpy 2.4 removed."""
    numpy = module.__dict__["np"]
    module.__dict__["np"] = ModuleOverlay(numpy, in1d=numpy.isin)


def _find_float(module: ModuleType) -> None:
    """Give YouTube-VIS' metric and PAN's kernel `numpy.float`, which numpy 1.24 removed."""
    module.__dict__["np"] = ModuleOverlay(module.__dict__["np"], float=float)


def _load_through_backend(module: ModuleType) -> None:
    """Read annotations through the ``backend_args`` of their data set, as mmdet3d 0.x read them (mmengine#1090)."""
    load, data_set = module.__dict__["load"], module.__dict__["BaseDataset"]
    chosen: ContextVar[Any] = ContextVar("backend_args", default=None)
    load_data_list = data_set.load_data_list

    def load_from_backend(file: Any, *args: Any, **named: Any) -> Any:
        if chosen.get() is not None:
            named.setdefault("backend_args", chosen.get())
        return load(file, *args, **named)

    def load_chosen(self: Any) -> Any:
        token = chosen.set(getattr(self, "backend_args", None))
        try:
            return load_data_list(self)
        finally:
            chosen.reset(token)

    module.__dict__["load"] = load_from_backend
    data_set.load_data_list = load_chosen


def _use_threads(module: ModuleType) -> None:
    """Give VOC's metric threads: it forks a process that runs torch's threads, and does not wait for its pool."""
    from multiprocessing.dummy import Pool

    module.__dict__["Pool"] = Pool


def _read_no_folder_as_list(module: ModuleType) -> None:
    """Keep a word of ``metainfo`` that is also the name of a folder here: upstream reads it as a file of names."""
    read = module.__dict__["list_from_file"]

    def list_from_file(filename: Any, *args: Any, **named: Any) -> Any:
        try:
            return read(filename, *args, **named)
        except IsADirectoryError as error:
            raise FileNotFoundError(*error.args) from error  # which upstream takes as: this is a word

    module.__dict__["list_from_file"] = list_from_file


def _read_annotations(module: ModuleType) -> None:
    _load_through_backend(module)
    _read_no_folder_as_list(module)


def _draw_clouds(module: ModuleType) -> None:
    """Draw clouds from above where open3d is missing, which ``--show-dir`` of mmdet3d wants."""
    from serve.upstream.cloud_pictures import draw_clouds_from_above

    draw_clouds_from_above(module)


def _keep_machine_code(module: ModuleType) -> None:
    """Keep the machine code of KITTI's metric between processes: numba compiles it for five seconds."""
    from serve.ops.cpu.jit import keep_machine_code

    for compiled in vars(module).values():
        if hasattr(compiled, "enable_caching"):
            keep_machine_code(compiled, "kitti_metric")


def _replace_rotated_iou(module: ModuleType) -> None:
    from serve.upstream.rotated_iou import rotate_iou_gpu_eval

    module.__dict__["rotate_iou_gpu_eval"] = rotate_iou_gpu_eval


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling": _find_in1d,
    "mmcv.ops.pixel_group": _find_float,
    "mmdet.apis.det_inferencer": former_calls.default_visualizer("DetInferencer", "mmdet.DetLocalVisualizer"),
    "mmdet.apis.inference": former_calls.mend_inference,
    "mmdet.evaluation.functional.mean_ap": _use_threads,
    "mmdet.evaluation.functional.ytviseval": _find_float,
    "mmdet.models.detectors.base": former_calls.add_show_result,
    "mmdet3d.apis.inferencers.base_3d_inferencer": former_calls.default_visualizer(
        "Base3DInferencer", "mmdet3d.Det3DLocalVisualizer"
    ),
    "mmdet3d.evaluation.functional.kitti_utils.eval": _keep_machine_code,
    "mmdet3d.evaluation.functional.scannet_utils.evaluate_semantic_instance": _find_in1d,
    "mmengine.dataset.base_dataset": _read_annotations,
    "mmdet3d.visualization.local_visualizer": _draw_clouds,
    "mmengine.dist.utils": _init_processes,
    "mmengine.model.wrappers.distributed": _wrap_on_cpu,
    "mmengine.runner.checkpoint": _read_checkpoints_as_data,
}
# Modules whose own code is not run at all.
REPLACED: dict[str, Callable[[ModuleType], None]] = {
    "mmdet3d.evaluation.functional.kitti_utils.rotate_iou": _replace_rotated_iou,
}


class _ReplacingLoader(importlib.abc.Loader):
    """Loader that fills a module without running its file."""

    def __init__(self, fill: Callable[[ModuleType], None]) -> None:
        self._fill = fill

    def exec_module(self, module: ModuleType) -> None:
        self._fill(module)


class _StandInLoader(PatchingLoader):
    """Loader that runs a module while stand-ins supply its missing packages."""

    def __init__(self, loader: Any, packages: Sequence[str]) -> None:
        super().__init__(loader, lambda module: None)
        self._packages = packages

    def exec_module(self, module: ModuleType) -> None:
        with stand_in(self._packages):
            super().exec_module(module)


class _UpstreamFinder(importlib.abc.MetaPathFinder):
    """Finder for the modules of upstream that need a correction; the finders behind it find them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not (fullname in PATCHES or fullname in REPLACED or fullname in PACKAGES):
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(fullname, path, target) for finder in behind)
        spec = next((each for each in found if each is not None), None)
        if spec is None:
            return None
        if fullname in REPLACED:
            spec.loader = _ReplacingLoader(REPLACED[fullname])
        elif fullname in PACKAGES:
            spec.loader = _StandInLoader(spec.loader, PACKAGES[fullname])
        else:
            spec.loader = PatchingLoader(spec.loader, PATCHES[fullname])
        return spec


def apply() -> None:
    """Apply all corrections, kernels included. Cheap and idempotent; imports nothing of upstream."""
    ops.install()
    if any(isinstance(finder, _UpstreamFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _UpstreamFinder())
    for name, patch in {**PATCHES, **REPLACED}.items():
        if name in sys.modules:
            patch(sys.modules[name])
