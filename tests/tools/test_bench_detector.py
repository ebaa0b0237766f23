"""The benchmark's native side in a process of its own, what is made of its answers, and the growth table."""

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
from tools.bench import detector, scaling  # noqa: E402
from tools.bench.commands import detector as detector_command  # noqa: E402
from tools.bench.commands import native_env as native_env_command  # noqa: E402
from tools.bench.reference import environment as native_environment  # noqa: E402
from tools.bench.reference import nondeterminism as race  # noqa: E402
from tools.bench.reference.process import NativeProcess  # noqa: E402
from tools.demo.scenes import sample_frame  # noqa: E402
from tools.demo.training import CHECKPOINT, CONFIG  # noqa: E402

# In the tests the native side runs on our kernels: this environment has no others.
PYTHON = Path(sys.executable)


@pytest.fixture(scope="module")
def subject(demo_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> detector.Subject:
    folder = tmp_path_factory.mktemp("bench")
    frame = folder / "scene.bin"
    frame.write_bytes(sample_frame())
    return detector.Subject(archive.extract(demo_mar, folder / "opened"), CONFIG, CHECKPOINT, frame)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.slow
def test_both_sides_are_timed_by_stage_and_found_equal_and_the_json_repeats_the_table(
    subject: detector.Subject,
) -> None:
    done: list[int] = []
    others = set(psutil.Process().children())  # servers that tests before this one share
    result = detector.run(subject, native_python=PYTHON, rounds=1, progress=done.append)
    assert done == [1, 2, 3]
    assert list(result.native) == list(result.ours)
    assert {"voxelize", "encode", "dense", "head", "select", "total"} <= set(result.native)
    for side in (result.native, result.ours):
        stages = sum(seconds for stage, seconds in side.items() if stage != "total")
        assert stages == pytest.approx(side["total"])
    assert result.equal and result.detections > 0 and result.largest_box < 1e-4
    assert "portable kernels of mmcv, sparse convolution of mmcv" in result.native_side
    # Our kernels do not race.
    assert result.race is not None and result.race.one_thread_repeats
    assert set(result.race.from_one_thread + result.race.from_run_before) == {0}
    table = result.table().splitlines()
    assert any(
        line.startswith("encode") and line.endswith(f"{result.ratios['encode']:.2f}") for line in table
    )
    assert "equal within 1e-4 (native with 1 thread)" in result.table()
    said = json.loads(result.json_line())
    assert "\n" not in result.json_line()
    assert said["ratio_total"] == result.native["total"] / result.ours["total"] == said["ratios"]["total"]
    assert set(psutil.Process().children()) <= others


def test_an_error_of_the_native_side_is_a_sentence_and_it_goes_on(tmp_path: Path) -> None:
    with NativeProcess(PYTHON, 1) as native:
        for _ in range(2):
            with pytest.raises(InferenceFailed, match=r"nowhere\.py"):
                native.ask("load", config="nowhere.py", checkpoint="nowhere.pth", device="cpu")
    assert not psutil.pid_exists(native.pid)


def test_a_native_side_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    python = script(tmp_path / "python", "echo no such package >&2; exit 3")
    with (
        pytest.raises(SetupError, match=r"(?s)exit code 3.*no such package"),
        NativeProcess(python, 1) as native,
    ):
        native.ask("load", config="", checkpoint="", device="cpu")
    with NativeProcess(PYTHON, 1) as native:
        os.kill(native.pid, signal.SIGKILL)
        with pytest.raises(SetupError, match="exit code -9"):
            native.ask("load", config="", checkpoint="", device="cpu")
    assert not psutil.pid_exists(native.pid)


def test_a_native_side_that_talks_nonsense_or_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="cannot be started"):
        NativeProcess(tmp_path / "python", 1)
    python = script(tmp_path / "talker", "read -r question; echo Python 2.7")
    with pytest.raises(SetupError, match=r"no JSON: 'Python 2\.7"), NativeProcess(python, 1) as native:
        native.ask("load", config="", checkpoint="", device="cpu")


def test_an_interruption_leaves_no_process_even_if_the_native_side_does_not_listen(tmp_path: Path) -> None:
    python = script(tmp_path / "deaf", "trap '' INT TERM; exec sleep 600")
    with pytest.raises(KeyboardInterrupt), NativeProcess(python, 1) as native:
        raise KeyboardInterrupt
    assert not psutil.pid_exists(native.pid)


def test_the_native_side_sees_neither_our_packages_nor_more_threads(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/ours")
    seen = tmp_path / "seen"
    python = script(
        tmp_path / "python", f'read -r question; echo "$PYTHONPATH,$OMP_NUM_THREADS" > {seen}; echo "{{}}"'
    )
    with NativeProcess(python, 3) as native:
        assert native.ask("load") == {}
    assert seen.read_text() == ",3\n"


def test_voxels_that_differ_are_counted_by_place() -> None:
    places = np.array([[0, 1, 1], [0, 1, 2], [0, 2, 1]])
    features = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, -6.0]], dtype=np.float32)
    assert race.count_different((places, features), (places, features * np.float32(1 + 1e-6))) == 0
    other = features.copy()
    other[1, 0] += 0.01
    assert race.count_different((places, features), (places, other)) == 1
    assert race.count_different((places, features), (places[1:], other[1:])) == 2
    other[2, 1] = np.nan
    assert race.count_different((places, features), (places, other)) == 2


def test_growth_is_measured_at_every_size_and_the_cap_on_voxels_is_put_back(
    subject: detector.Subject,
) -> None:
    ours = load_detector(subject.archived, torch.device("cpu"))
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


def test_a_made_cloud_is_the_same_every_time_and_within_the_range() -> None:
    bounds = np.array([0, -40, -3, 70.4, 40, 1], dtype=np.float64)
    one = scaling.cloud(1000, bounds, 4)
    assert one.shape == (1000, 4) and one.dtype == np.float32
    assert np.array_equal(one, scaling.cloud(1000, bounds, 4))
    assert not np.array_equal(one, scaling.cloud(1000, bounds, 5))
    assert ((one[:, :3] >= bounds[:3]) & (one[:, :3] < bounds[3:])).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["second", "pointpillars", "--checkpoint", "x.pth"], "--checkpoint goes with one model"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--scaling", "--native-python", "python"], "no native side"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments: list[str], said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        detector_command.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_native_environment_asks_for_a_compiler_first(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match=r"C\+\+ compiler"):
        native_env_command.main(["--folder", str(tmp_path / "native")])
    assert not (tmp_path / "native").exists()


def test_a_package_is_left_out_of_a_lock_with_its_hashes() -> None:
    kept = "addict==2.4.0 \\\n    --hash=sha256:aa\n    # via mmcv-lite"
    left_out = "mmcv-lite==2.1.0 \\\n    --hash=sha256:bb"
    last = "numpy==2.4.6 \\\n    --hash=sha256:cc"
    lock = "\n".join((kept, left_out, last)) + "\n"
    without = native_environment.without(lock, frozenset({"mmcv-lite"}))
    assert without.rstrip("\n") == f"{kept}\n{last}"
