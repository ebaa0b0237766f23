"""The wheel in an environment of torch, mmcv-lite, mmdet and mmdet3d, without the dependencies of this project.

The environment is made by pip from the hashes of runtime.lock, with the packages that mmdet and mmdet3d name. torch is
linked from the running environment: it is the one package that takes minutes to unpack.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
# What a user of mmdet and mmdet3d has; pyquaternion comes with nuscenes-devkit, which runtime.lock leaves out.
THEIRS = ("mmcv-lite", "mmengine", "mmdet", "mmdet3d", "numba", "opencv-python-headless", "pyquaternion")
LINKED = ("torch", "torchgen", "functorch", "torchvision", "torchvision.libs")

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]


def needed_by(names: tuple[str, ...]) -> set[str]:
    """Names of the packages and, recursively, of all that is installed here of what they ask for."""
    found: set[str] = set()
    ahead = list(names)
    while ahead:
        name = canonicalize_name(ahead.pop())
        if name in found:
            continue
        try:
            lines = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        asked = [Requirement(line) for line in lines]
        ahead += [one.name for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def locked_lines(names: set[str]) -> str:
    """The part of runtime.lock that pins these packages, hashes included."""
    text = (ROOT / "requirements" / "runtime.lock").read_text()
    blocks = re.findall(r"^[a-z0-9][^\n]*(?:\n    [^\n]*)*", text, re.MULTILINE)
    return "\n".join(block for block in blocks if re.split(r"[=\[ ]", block)[0] in names)


class Environment:
    """A virtual environment in which the wheel is installed without its dependencies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
        base = {"base": str(folder), "platbase": str(folder)}
        self.packages = Path(sysconfig.get_path("purelib", vars=base))
        self.wheel = Path()

    def pip(self, *arguments: str) -> None:
        python = str(self.folder / "bin" / "python")
        command = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "--quiet"]
        ran = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-3000:]

    def python(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python outside of the checkout, without a compiler on the path."""
        kept = {
            name: text
            for name, text in os.environ.items()
            if not name.startswith(("MMDET3D_SERVE_", "PYTHON"))
        }
        return subprocess.run(
            [str(self.folder / "bin" / "python"), *arguments],
            env={**kept, "PATH": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1", **variables},
            cwd=self.folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Iterator[Environment]:
    folder = tmp_path_factory.mktemp("bare")
    environment = Environment(folder / "venv")
    # A copy: the cached wheel goes when another run finds changed code.
    environment.wheel = shutil.copy(wheel, folder)
    names = needed_by((*THEIRS, "torch")) - {"torch"}
    (folder / "theirs.txt").write_text(locked_lines(names))
    environment.pip(
        "install", "--no-deps", "--require-hashes", "--only-binary=:all:", "-r", str(folder / "theirs.txt")
    )
    here = Path(sysconfig.get_path("purelib"))
    for path in (*(here / name for name in LINKED), *here.glob("torch-*.dist-info")):
        if path.exists():
            (environment.packages / path.name).symlink_to(path)
    environment.pip("install", "--no-deps", "--no-index", str(environment.wheel))
    yield environment


def has(environment: Environment, name: str) -> bool:
    return any(environment.packages.glob(f"{name}-*.dist-info"))


def test_environment_holds_none_of_the_dependencies_of_this_project(bare: Environment) -> None:
    assert has(bare, "mmdet3d_serve") and has(bare, "mmcv_lite") and has(bare, "mmdet3d")
    assert not [name for name in ("pydantic", "fastapi", "boto3", "httpx", "orjson") if has(bare, name)]


NMS = """
import sys
from mmcv.ops import nms
import torch
boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
print(nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)[1].tolist(), hasattr(sys.modules["mmcv._ext"], "PORTABLE"))
"""


def test_mmcv_ops_import_and_run_without_a_call_to_this_project(bare: Environment) -> None:
    ran = bare.python("-c", NMS)
    assert ran.stdout == "[0, 2] True\n", ran.stderr


DETECTOR = """
import mmdet, numpy as np
from pathlib import Path
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
folder = Path(mmdet.__file__).parent / ".mim" / "configs" / "faster_rcnn"
config = Config.fromfile(folder / "faster-rcnn_r50_fpn_1x_coco.py")
config.model.backbone.init_cfg = None
config.model.test_cfg.rcnn.score_thr = 0.0
config.test_dataloader.dataset.pipeline[1].scale = (320, 200)
model = init_detector(config, None, device="cpu", palette="coco")
picture = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
found = inference_detector(model, picture).pred_instances
print(found.bboxes.shape[1], len(found.bboxes) > 0, bool(found.scores.isfinite().all()))
"""


def test_a_detector_of_mmdet_is_built_and_run(bare: Environment) -> None:
    ran = bare.python("-c", DETECTOR)
    assert ran.stdout.splitlines()[-1:] == ["4 True True"], ran.stderr[-3000:]


VOXELS = """
import numpy as np, torch
import mmdet3d.apis
from mmdet3d.models.data_preprocessors.voxelize import VoxelizationByGridShape
points = torch.tensor([[0.1, 0.1, 0.1, 1.0], [0.2, 0.1, 0.1, 2.0], [3.9, 3.9, 0.9, 3.0], [9.0, 0.0, 0.0, 4.0]])
layer = VoxelizationByGridShape([0, 0, 0, 4, 4, 1], max_num_points=5, voxel_size=[1, 1, 1], max_voxels=10)
voxels, coordinates, counts = layer(points)
print(coordinates.tolist(), counts.tolist(), voxels[0, :2, 3].tolist())
"""


def test_points_are_voxelized_by_mmdet3d(bare: Environment) -> None:
    ran = bare.python("-c", VOXELS)
    assert ran.stdout.splitlines()[-1:] == ["[[0, 0, 0], [0, 3, 3]] [2, 1] [1.0, 2.0]"], ran.stderr[-3000:]


def test_info_names_the_kernels_in_use(bare: Environment) -> None:
    ran = bare.python("-m", "serve.ops.info")
    assert ran.returncode == 0, ran.stderr
    assert f"autoload   on, by {bare.packages / 'mmdet3d_serve_autoload.pth'}" in ran.stdout
    assert "kernels    portable" in ran.stdout and "keeps boxes [0, 2]" in ran.stdout
    assert f"torch {metadata.version('torch')}" in ran.stdout


def test_commands_name_the_extra_that_they_lack(bare: Environment) -> None:
    assert bare.python("-m", "serve", "--version").returncode == 0
    for command, extra in (("gateway", "gateway"), ("archive", "models")):
        ran = bare.python("-m", "serve", command, "--help")
        assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
        assert f"mmdet3d-serve[{extra}]" in ran.stderr


def test_newer_mmcv_is_accepted_by_mmdet_and_mmdet3d(bare: Environment) -> None:
    """mmcv 2.2.0, which mmdet and mmdet3d alone refuse; the environment gets its former mmcv back."""
    code = (
        "import mmcv, mmdet, mmdet3d; print(mmcv.__version__, mmdet.__version__, mmdet.mmcv_maximum_version)"
    )
    bare.pip("install", "--no-deps", "--only-binary=:all:", "mmcv-lite==2.2.0", "mmdet==3.3.0")
    try:
        ran = bare.python("-c", code)
        assert ran.stdout == "2.2.0 3.3.0 2.3.0\n", ran.stderr[-3000:]
        refused = bare.python("-c", f"import sys; sys.meta_path.pop(0)\n{code}")
        assert "MMCV==2.2.0 is used but incompatible" in refused.stderr
        for program, last in ((NMS, "[0, 2] True"), (DETECTOR, "4 True True")):
            ran = bare.python("-c", program)
            assert ran.stdout.splitlines()[-1:] == [last], ran.stderr[-3000:]
    finally:
        pinned = [f"{name}=={metadata.version(name)}" for name in ("mmcv-lite", "mmdet")]
        bare.pip("install", "--no-deps", "--only-binary=:all:", *pinned)


def test_nothing_is_left_after_uninstalling(bare: Environment) -> None:
    bare.pip("uninstall", "--yes", "mmdet3d-serve")
    try:
        ran = bare.python("-c", "print('fine'); import mmcv.ops")
        assert ran.stdout == "fine\n"
        assert ran.stderr.endswith("ModuleNotFoundError: No module named 'mmcv._ext'\n")
        assert ran.stderr.startswith("Traceback")
        left = [
            path for path in bare.packages.iterdir() if re.match(r"serve|handlers|mmdet3d_serve", path.name)
        ]
        assert left == [] and not (bare.folder / "share" / "mmdet3d-serve").exists()
    finally:
        bare.pip("install", "--no-deps", "--no-index", str(bare.wheel))
