"""The short form of `test_bare_environment`: imports with the dependencies of this project hidden."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.utils import canonicalize_name

from tests.deployment.test_bare_environment import NMS, THEIRS, needed_by

ROOT = Path(__file__).resolve().parents[2]
HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2:]:
            raise ModuleNotFoundError(f"No module named {name!r}, which is hidden", name=name)
sys.meta_path.insert(0, Hidden())
"""
# What a training of a user of mmcv reads and imports besides.
RUN = """
import mmdet.apis, mmdet3d.apis
from mmengine.runner import load_checkpoint
print(load_checkpoint(torch.nn.Linear(1, 1), sys.argv[1])["state_dict"]["weight"].item())
"""


def hidden() -> list[str]:
    """Top-level packages here that mmcv, mmdet and mmdet3d do not ask for."""
    theirs = needed_by((*THEIRS, "torch"))
    return sorted(
        package
        for package, owners in metadata.packages_distributions().items()
        if not any(canonicalize_name(owner) in theirs | {"mmdet3d-serve"} for owner in owners)
    )


@pytest.mark.slow
def test_kernels_and_packages_import_without_the_dependencies_of_this_project(tmp_path: Path) -> None:
    packages = hidden()
    assert {"orjson", "pydantic", "fastapi", "boto3", "httpx"} <= set(packages)
    checkpoint = tmp_path / "w.pth"
    torch.save({"state_dict": {"weight": torch.full((1, 1), 3.0), "bias": torch.ones(1)}}, checkpoint)
    ran = subprocess.run(
        [sys.executable, "-c", HIDE + NMS + RUN, str(checkpoint), *packages],
        cwd=tmp_path, env={"PATH": "/nonexistent", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = ran.stdout.splitlines()
    assert lines[0] == "[0, 2] True" and lines[-1] == "3.0"
