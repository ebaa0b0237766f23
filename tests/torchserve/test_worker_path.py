"""No file of an unpacked archive can stand in for a module of a worker, before or after Python has started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from serve.errors import BackendStartError
from serve.settings.environment import child_environment
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions, java
from tests.conftest import pick_free_ports, write_archive

ROOT = Path(__file__).parents[2]
# Read before, at and after the start of the interpreter, or by TorchServe's own worker.
SHADOWS = (
    "sitecustomize",
    "usercustomize",
    "argparse",
    "uuid",
    "ts/__init__",
    "torch/__init__",
    "numpy",
    "orjson",
)


def shadows(flags: Path) -> dict[str, str]:
    """Modules that note that they ran."""
    return {
        f"{name}.py": f"import os\nopen({str(flags)!r} + os.sep + {name.replace('/', '.')!r}, 'w').close()\n"
        for name in SHADOWS
    }


@pytest.mark.torchserve
@pytest.mark.parametrize("inherited", ["", "."])
def test_modules_in_an_archive_do_not_run_in_its_worker(tmp_path, monkeypatch, inherited):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{inherited}")
    flags = tmp_path / "ran"
    flags.mkdir()
    write_archive(tmp_path / "store" / "hostile.mar", "tests.torchserve.path_handler", files=shadows(flags))
    ports = dict(zip(("inference_port", "management_port", "metrics_port"), pick_free_ports(3), strict=True))
    options = TorchServeOptions(
        tmp_path / "store", [ServedModel("hostile.mar")], system_metrics=False, gpus=0, **ports
    )
    with TorchServe(options) as server:
        seen = httpx.post(f"{server.inference_url}/predictions/hostile", content=b"x", trust_env=False).json()
    assert not list(flags.iterdir())
    assert str(server.run_dir) in seen["here"] and seen["inside"] == []


@pytest.mark.parametrize("installed", [True, False])
def test_worker_python_replaces_the_path_and_passes_arguments(tmp_path, monkeypatch, installed):
    if not installed:
        copy = tmp_path / "not-executable.sh"
        copy.write_bytes(java._WORKER_PYTHON.read_bytes())
        monkeypatch.setattr(java, "_WORKER_PYTHON", copy)
    hostile = tmp_path / "archive"
    hostile.mkdir()
    (hostile / "sitecustomize.py").write_text("print('hostile')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}/it's here{os.pathsep}/b"}
    python = java.worker_python(tmp_path, environment)
    assert (python.parent == tmp_path) != installed
    ended = subprocess.run(
        [
            python,
            "-c",
            "import os, sys; print(os.environ['PYTHONPATH'], sys.argv[1:], sys.prefix)",
            "a b",
            "$c",
        ],
        env={**environment, "PYTHONPATH": f"{environment['PYTHONPATH']}{os.pathsep}{hostile}{os.pathsep}"},
        cwd=hostile,
        capture_output=True,
        text=True,
    )
    assert ended.stdout == f"{environment['PYTHONPATH']} ['a b', '$c'] {sys.prefix}\n", ended.stderr


def test_file_system_without_programs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(BackendStartError, match=str(tmp_path)):
        java.worker_python(tmp_path, {"PYTHONPATH": "/a"})


def test_child_has_no_relative_folder_on_its_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "lib", "/abs", ""]))
    folders = child_environment()["PYTHONPATH"].split(os.pathsep)
    assert folders == [str(ROOT), str(tmp_path), str(tmp_path / "lib"), "/abs"]


def test_import_of_a_handler_takes_unpacked_archives_off_the_path(tmp_path):
    """As under a TorchServe that this project did not start."""
    (tmp_path / "MAR-INF").mkdir()
    (tmp_path / "MAR-INF" / "MANIFEST.json").write_text("{}")
    (tmp_path / "orjson.py").write_text("raise SystemExit('the archive has run code')")
    program = "import handlers.mmdet_handler, sys; print(sys.path.count(sys.argv[1]), sys.path.count(''))"
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "0 0\n", ended.stderr
