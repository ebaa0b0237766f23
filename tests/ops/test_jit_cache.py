"""Cache of compiled kernels: shared by processes, in any writable folder, and never a reason to fail."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.ops.cpu import jit_cache

pytestmark = pytest.mark.slow  # together: each starts Pythons of its own
ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
# Runs NMS, then prints numba's cache statistics and the folder of the machine code.
PROGRAM = """
import json, sys
from pathlib import Path
import serve.ops
serve.ops.install("portable", cache_dir=Path(sys.argv[1]))
import torch
from serve.ops.boxes import nms
from serve.ops.cpu import jit_cache
kept = nms.nms(torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [9, 9, 12, 12]]), torch.tensor([3.0, 2, 1]), 0.5, 0)
stats = nms._nms_cpu.stats
print(json.dumps({"kept": kept.tolist(), "hits": sum(stats.cache_hits.values()),
                  "misses": sum(stats.cache_misses.values()), "folder": str(jit_cache.folder('boxes.nms'))}))
"""


@pytest.fixture
def installed(tmp_path) -> Iterator[Path]:
    """Copy the package to its own folder, without machine code."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "serve", site / "serve", ignore=shutil.ignore_patterns("__pycache__"))
    yield site
    may_be_written(site, True)


def may_be_written(folder: Path, allowed: bool) -> None:
    for one in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        os.chmod(one, 0o755 if allowed else 0o555)


def obey_permissions() -> None:
    """Drop root's capabilities to ignore permissions (Linux, capabilities(7)) before exec."""
    for capability in (1, 2, 3):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def run(site: Path, cache_dir: Path, **variables: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    environment.pop("NUMBA_CACHE_DIR", None)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(cache_dir)],
        env=environment, cwd=site, capture_output=True, text=True, check=False, preexec_fn=obey_permissions,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result["kept"] == [0, 2]
    return result


@pytest.fixture
def sealed(tmp_path) -> Path:
    """Create a read-only folder."""
    (tmp_path / "sealed").mkdir(mode=0o555)
    return tmp_path / "sealed"


def test_second_process_uses_the_cache(installed, tmp_path):
    first = run(installed, tmp_path / "cache")
    second = run(installed, tmp_path / "cache")
    assert (first["hits"], first["misses"]) == (0, 1)
    assert (second["hits"], second["misses"]) == (1, 0)
    assert first["folder"] == second["folder"]
    assert Path(first["folder"]).parent == installed / "serve" / "ops" / "__pycache__"
    assert not (tmp_path / "cache").exists()


def test_package_that_pip_installed_is_not_written_to(installed, tmp_path):
    (installed / "mmdet3d_serve-0.2.0.dist-info").mkdir()
    first = run(installed, tmp_path / "cache")
    second = run(installed, tmp_path / "cache")
    assert (first["misses"], second["hits"], second["misses"]) == (1, 1, 0)
    assert Path(second["folder"]).parent == tmp_path / "cache"
    assert not (installed / "serve" / "ops" / "__pycache__").exists()


def test_read_only_package_copies_its_kernels_to_the_cache_folder(installed, sealed, tmp_path):
    run(installed, sealed)
    may_be_written(installed, False)
    result = run(installed, tmp_path / "cache", HOME=str(sealed))
    assert (result["hits"], result["misses"]) == (1, 0)
    assert Path(result["folder"]).parent == tmp_path / "cache"


def test_temporary_folder_is_used_without_home_and_cache(installed, sealed, tmp_path):
    may_be_written(installed, False)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    first, second = (
        run(installed, Path("~/.cache/mmdet3d-serve"), HOME=str(sealed), TMPDIR=str(scratch))
        for _ in range(2)
    )
    assert (first["misses"], second["hits"], second["misses"]) == (1, 1, 0)
    place = scratch / f"mmdet3d-serve-{os.getuid()}"
    assert Path(second["folder"]).parent == place
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_process_without_writable_folder_compiles_for_itself(installed, sealed):
    may_be_written(installed, False)
    program = PROGRAM.replace(
        "import torch", "import torch, tempfile; tempfile._candidate_tempdir_list = lambda: [sys.argv[1]]"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(sealed)],
        env={**os.environ, "PYTHONPATH": str(installed), "HOME": str(sealed)},
        cwd=sealed, capture_output=True, text=True, check=False, preexec_fn=obey_permissions,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert (result["kept"], result["misses"], result["folder"]) == ([0, 2], 1, "None")


def test_changed_import_of_a_kernel_invalidates_its_cache(installed, tmp_path):
    first = run(installed, tmp_path / "cache")
    with (installed / "serve" / "ops" / "cpu" / "jit.py").open("a") as source:
        source.write("# another version\n")
    second = run(installed, tmp_path / "cache")
    assert second["misses"] == 1 and second["folder"] != first["folder"]
    assert not Path(first["folder"]).exists()  # outdated folders do not accumulate


def test_truncated_cache_file_is_a_miss(installed, tmp_path):
    folder = Path(run(installed, tmp_path / "cache")["folder"])
    for file in folder.rglob("nms._nms_cpu*.nbc"):
        file.write_bytes(file.read_bytes()[:100])
    assert run(installed, tmp_path / "cache")["misses"] == 1


def test_kernel_runs_if_the_cache_folder_disappears(tmp_path):
    # Simulate a full disk: at the first compilation the folder has been replaced by a file.
    program = PROGRAM.replace(
        "from serve.ops.cpu import jit_cache",
        "from serve.ops.cpu import jit_cache; import shutil\n"
        "shutil.rmtree(jit_cache.folder('boxes.nms')); jit_cache.folder('boxes.nms').write_text('')",
    )
    site = tmp_path / "site"
    shutil.copytree(ROOT / "serve", site / "serve", ignore=shutil.ignore_patterns("__pycache__"))
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "cache")],
        env={**os.environ, "PYTHONPATH": str(site)}, cwd=site, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["kept"] == [0, 2]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_folder_writable_by_others_is_not_used(tmp_path, mode):
    own, place = tmp_path / "file", tmp_path / "place"
    own.write_text("the sources' folder cannot be written")
    made = jit_cache.choose_folder("boxes.nms", own, [place])
    assert made is not None and made.parent == place
    os.chmod(made, mode)
    assert jit_cache.choose_folder("boxes.nms", own, [place]) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a file away")
def test_folder_of_another_user_is_not_used(tmp_path):
    own, place = tmp_path / "file", tmp_path / "place"
    own.write_text("")
    made = jit_cache.choose_folder("boxes.nms", own, [place])
    assert made is not None
    os.chown(made, NOBODY, NOBODY)
    other = jit_cache.choose_folder("boxes.nms", own, [place, tmp_path / "other"])
    assert other is not None and other.parent == tmp_path / "other"
