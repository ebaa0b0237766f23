"""The detector benchmark: the reference process, its comparison with ours, and the scaling table."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from serve import archive, ops

ops.install("portable")

from serve.errors import InferenceFailed, SetupError  # noqa: E402
from serve.runtime import load_detector  # noqa: E402
from serve.synthetic.scenes import sample_frame  # noqa: E402
from tools.bench import detector, scaling  # noqa: E402
from tools.bench.commands import detector as detector_command  # noqa: E402
from tools.bench.commands import native_env as native_env_command  # noqa: E402
from tools.bench.reference import environment, nondeterminism  # noqa: E402
from tools.bench.reference.process import ReferenceProcess  # noqa: E402
from tools.demo.training import CHECKPOINT, CONFIG  # noqa: E402

# The reference process uses our kernels here: this environment has no others.
PYTHON = Path(sys.executable)


@pytest.fixture(scope="module")
def workload(demo_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> detector.Workload:
    folder = tmp_path_factory.mktemp("bench")
    frame = folder / "scene.bin"
    frame.write_bytes(sample_frame())
    return detector.Workload(archive.extract(demo_mar, folder / "opened"), CONFIG, CHECKPOINT, frame)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.slow
def test_detector_benchmark_times_stages_and_compares_detections(
    workload: detector.Workload,
) -> None:
    done: list[int] = []
    others = set(psutil.Process().children())  # servers shared with other tests
    result = detector.run(workload, native_python=PYTHON, rounds=1, progress=done.append)
    assert done == [1, 2, 3]
    assert list(result.native) == list(result.ours)
    assert {"voxelize", "encode", "dense", "head", "select", "total"} <= set(result.native)
    for side in (result.native, result.ours):
        stages = sum(seconds for stage, seconds in side.items() if stage != "total")
        assert stages == pytest.approx(side["total"])
    assert result.equal and result.detections > 0 and result.largest_box < 1e-4
    assert "portable kernels of mmcv, sparse convolution of mmcv" in result.native_side
    # Our kernels are deterministic with any number of threads.
    assert result.nondeterminism is not None and result.nondeterminism.one_thread_repeats
    assert set(result.nondeterminism.from_one_thread + result.nondeterminism.from_run_before) == {0}
    table = result.table().splitlines()
    assert any(
        line.startswith("encode") and line.endswith(f"{result.ratios['encode']:.2f}") for line in table
    )
    assert "equal to native with 1 thread within 0.001 m, 0.05 px, score 0.0002" in result.table()
    document = json.loads(result.json_line())
    assert "\n" not in result.json_line()
    ratio = result.native["total"] / result.ours["total"]
    assert document["ratio_total"] == ratio == document["ratios"]["total"]
    assert set(psutil.Process().children()) <= others


@pytest.mark.slow
def test_a_batch_is_measured_per_frame(workload: detector.Workload) -> None:
    result = detector.run(workload, rounds=1, batch=3)
    assert result.batch == 3 and result.equal
    assert "3 frames at once, per frame" in result.table()
    assert json.loads(result.json_line())["batch"] == 3
    # Three frames take longer than one; per frame they do not take longer than three alone.
    assert 0 < result.ours["total"] < 3 * result.native["total"]


def test_reference_process_survives_a_failed_command(tmp_path: Path) -> None:
    with ReferenceProcess(PYTHON, 1) as native:
        for _ in range(2):
            with pytest.raises(InferenceFailed, match=r"nowhere\.py"):
                native.call("load", config="nowhere.py", checkpoint="nowhere.pth", device="cpu")
    assert not psutil.pid_exists(native.pid)


def test_reference_process_that_exits_reports_its_log(tmp_path: Path) -> None:
    python = script(tmp_path / "python", "echo no such package >&2; exit 3")
    with (
        pytest.raises(SetupError, match=r"(?s)code 3.*no such package"),
        ReferenceProcess(python, 1) as native,
    ):
        native.call("load", config="", checkpoint="", device="cpu")
    with ReferenceProcess(PYTHON, 1) as native:
        os.kill(native.pid, signal.SIGKILL)
        with pytest.raises(SetupError, match="code -9"):
            native.call("load", config="", checkpoint="", device="cpu")
    assert not psutil.pid_exists(native.pid)


def test_missing_or_incompatible_reference_python_raises_setup_error(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="python"):
        ReferenceProcess(tmp_path / "python", 1)
    python = script(tmp_path / "talker", "read -r question; echo Python 2.7")
    with pytest.raises(SetupError, match=r"'Python 2\.7"), ReferenceProcess(python, 1) as native:
        native.call("load", config="", checkpoint="", device="cpu")


def test_interruption_kills_a_reference_process_that_ignores_signals(tmp_path: Path) -> None:
    python = script(tmp_path / "deaf", "trap '' INT TERM; exec sleep 600")
    with pytest.raises(KeyboardInterrupt), ReferenceProcess(python, 1) as native:
        raise KeyboardInterrupt
    assert not psutil.pid_exists(native.pid)


def test_reference_process_gets_no_python_path_and_its_own_threads(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/ours")
    seen = tmp_path / "seen"
    python = script(
        tmp_path / "python", f'read -r question; echo "$PYTHONPATH,$OMP_NUM_THREADS" > {seen}; echo "{{}}"'
    )
    with ReferenceProcess(python, 3) as native:
        assert native.call("load") == {}
    assert seen.read_text() == ",3\n"


def test_count_different_matches_voxels_by_index() -> None:
    places = np.array([[0, 1, 1], [0, 1, 2], [0, 2, 1]])
    features = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, -6.0]], dtype=np.float32)
    assert nondeterminism.count_different((places, features), (places, features * np.float32(1 + 1e-6))) == 0
    other = features.copy()
    other[1, 0] += 0.01
    assert nondeterminism.count_different((places, features), (places, other)) == 1
    assert nondeterminism.count_different((places, features), (places[1:], other[1:])) == 2
    other[2, 1] = np.nan
    assert nondeterminism.count_different((places, features), (places, other)) == 2


def test_scaling_measures_every_size_and_restores_max_voxels(
    workload: detector.Workload,
) -> None:
    ours = load_detector(workload.archived, torch.device("cpu"))
    cap = ours.network.data_preprocessor.voxel_layer.max_voxels
    done: list[int] = []
    result = scaling.run(ours, points=(500, 2000), batches=(2,), rounds=1, progress=done.append)
    assert done == [1, 2, 3]
    assert [(row.points, row.batch) for row in result.rows] == [(500, 1), (2000, 1), (30_000, 2)]
    first, second, batch = result.rows
    assert 0 < first.voxels < second.voxels < batch.voxels
    assert all(0 < row.voxelize < row.total and 0 < row.encode < row.total for row in result.rows)
    assert ours.network.data_preprocessor.voxel_layer.max_voxels == cap
    assert len(result.table().splitlines()) == 3 + len(result.rows)
    assert len(json.loads(result.json_line())["scaling"]["rows"]) == 3


def test_synthetic_cloud_is_reproducible_and_within_range() -> None:
    bounds = np.array([0, -40, -3, 70.4, 40, 1], dtype=np.float64)
    one = scaling.synthetic_cloud(1000, bounds, 4)
    assert one.shape == (1000, 4) and one.dtype == np.float32
    assert np.array_equal(one, scaling.synthetic_cloud(1000, bounds, 4))
    assert not np.array_equal(one, scaling.synthetic_cloud(1000, bounds, 5))
    assert ((one[:, :3] >= bounds[:3]) & (one[:, :3] < bounds[3:])).all()


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["second", "pointpillars", "--checkpoint", "x.pth"], "--checkpoint"),
        (["--rounds", "0"], "--rounds"),
        (["--scaling", "--native-python", "python"], "--scaling"),
        (["--scaling", "--batch", "8"], "--batch"),
    ],
)
def test_conflicting_arguments_exit_with_2_and_name_the_flag(
    arguments: list[str], flag: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as exited:
        detector_command.main(arguments)
    assert exited.value.code == 2 and flag in capsys.readouterr().err.splitlines()[-1]


def test_native_environment_without_a_compiler_fails_before_creating_files(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match=r"C\+\+ compiler"):
        native_env_command.main(["--folder", str(tmp_path / "native")])
    assert not (tmp_path / "native").exists()


def test_exclude_removes_a_package_from_a_lock_with_its_hashes() -> None:
    first = "addict==2.4.0 \\\n    --hash=sha256:aa\n    # via mmcv-lite"
    excluded = "mmcv-lite==2.1.0 \\\n    --hash=sha256:bb"
    last = "numpy==2.4.6 \\\n    --hash=sha256:cc"
    lock = "\n".join((first, excluded, last)) + "\n"
    assert environment.exclude(lock, frozenset({"mmcv-lite"})).rstrip("\n") == f"{first}\n{last}"
