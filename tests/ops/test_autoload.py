"""Autoloading of mmcv's kernels in every Python of an environment, by the two files that the wheel installs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import copy_sources_of_wheel

ROOT = Path(__file__).resolve().parents[2]
USE = "import mmcv._ext as e; print('portable' if hasattr(e, 'PORTABLE') else 'compiled')"


@pytest.fixture(scope="module")
def environment(tmp_path_factory, wheel) -> Path:
    """Create a virtual environment with the wheel's two files; it sees this environment's packages by path."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if name.startswith("mmdet3d_serve_autoload.")]
        file.extractall(packages, names)
    assert len(names) == 2
    return folder


def test_editable_wheel_holds_the_finder_too(tmp_path, wheel):
    copy_sources_of_wheel(tmp_path / "sources")
    code = "from setuptools import build_meta; build_meta.build_editable('..')"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path / "sources",
        capture_output=True,
        check=True,
    )
    (editable,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(editable) as second:
        for name in ("mmdet3d_serve_autoload.py", "mmdet3d_serve_autoload.pth"):
            assert first.read(name) == second.read(name)
        assert not [name for name in second.namelist() if name.startswith("serve/")]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, Path]:
    """Create folders with a package mmcv: one like mmcv-lite, one with an extension."""
    folders = {}
    for kind in ("lite", "compiled"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        (folders[kind] / "mmcv").mkdir()
        (folders[kind] / "mmcv" / "__init__.py").touch()
    (folders["compiled"] / "mmcv" / "_ext.py").touch()
    return folders


def python(environment: Path, code: str, *paths: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("MMDET3D_SERVE_")}
    joined = os.pathsep.join(str(path) for path in paths)
    return subprocess.run(
        [str(environment / "bin" / "python"), "-c", code],
        env={**kept, "PATH": "/nonexistent", "PYTHONPATH": joined, **variables},
        cwd=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


HERE = [Path(sysconfig.get_path("purelib")), *(Path(p) for p in sys.path if p.endswith("-packages"))]


@pytest.mark.slow
def test_plain_python_has_kittis_metric_without_cuda_and_without_the_kits_of_other_data_sets():
    code = """
import sys
from serve.ops import autoload
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "_Autoload"]
autoload.register()  # as the .pth file does
import numpy as np
from mmdet3d.evaluation import NuScenesMetric
from mmdet3d.evaluation.functional.kitti_utils.eval import bev_box_overlap
box = np.array([[0.0, 0.0, 2.0, 2.0, 0.0]])
print(f"{bev_box_overlap(box, box + [1.0, 0, 0, 0, 0])[0, 0]:.4f}")
"""
    ran = python(Path(sys.prefix), code, ROOT, *HERE)
    assert (ran.stdout, ran.returncode) == ("0.3333\n", 0), ran.stderr


def test_fresh_environment_without_a_compiler_imports_mmcv_ops(environment):
    ran = python(environment, f"import mmcv.ops; {USE}", ROOT, *HERE)
    assert (ran.stdout, ran.returncode) == ("portable\n", 0), ran.stderr


@pytest.mark.parametrize(
    ("installed", "asked", "taken"),
    [
        ("compiled", "", "compiled"),
        ("compiled", "auto", "compiled"),
        ("compiled", "portable", "portable"),
        ("lite", "auto", "portable"),
    ],
)
def test_compiled_extension_takes_precedence_unless_portable_is_set(
    environment, stand_ins, installed, asked, taken
):
    variables = {"MMDET3D_SERVE_OPS": asked} if asked else {}
    ran = python(environment, USE, stand_ins[installed], ROOT, *HERE, **variables)
    assert (ran.stdout, ran.returncode) == (f"{taken}\n", 0), ran.stderr


def test_install_argument_overrides_the_environment(environment, stand_ins):
    code = f"import serve.ops; serve.ops.install('auto'); serve.ops.install(); {USE}"
    ran = python(environment, code, stand_ins["compiled"], ROOT, MMDET3D_SERVE_OPS="portable")
    assert (ran.stdout, ran.returncode) == ("compiled\n", 0), ran.stderr


def test_install_without_argument_reads_the_environment(environment, stand_ins):
    code = f"import serve.ops; serve.ops.install(); {USE}"
    ran = python(environment, code, stand_ins["compiled"], ROOT, *HERE, MMDET3D_SERVE_OPS="portable")
    assert (ran.stdout, ran.returncode) == ("portable\n", 0), ran.stderr


def test_interpreter_start_imports_neither_serve_nor_heavy_modules(environment):
    code = (
        "import sys; print(sorted({'serve', 'torch', 'numba', 'numpy', 'mmcv', 'typing'} & set(sys.modules)))"
    )
    ran = python(environment, code, ROOT, *HERE)
    assert (ran.stdout, ran.stderr) == ("[]\n", "")


def test_invalid_setting_raises_when_kernels_are_first_imported(environment, stand_ins):
    begun = python(
        environment, "import mmcv; print('fine')", stand_ins["lite"], ROOT, MMDET3D_SERVE_OPS="fast"
    )
    assert (begun.stdout, begun.stderr, begun.returncode) == ("fine\n", "", 0)
    used = python(environment, USE, stand_ins["lite"], ROOT, *HERE, MMDET3D_SERVE_OPS="fast")
    assert used.returncode == 1
    last = used.stderr.splitlines()[-1]
    assert "SettingsError" in last and "MMDET3D_SERVE_OPS" in last and "fast" in last


def test_python_starts_without_the_project_and_mmcv_reports_the_missing_extension(environment, stand_ins):
    ran = python(environment, "print('fine'); import mmcv._ext", stand_ins["lite"])
    assert ran.stdout == "fine\n"
    assert ran.stderr.endswith("ModuleNotFoundError: No module named 'mmcv._ext'\n")


def test_user_module_named_serve_is_not_shadowed(environment, stand_ins, tmp_path):
    (tmp_path / "serve.py").write_text("MINE = True")
    ran = python(environment, "import serve, mmcv; print(serve.MINE)", tmp_path, stand_ins["lite"])
    assert (ran.stdout, ran.stderr) == ("True\n", "")
