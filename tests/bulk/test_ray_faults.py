"""What is lost under a run on Ray: its command, its head, what it knows. Each frame has one result in the end."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve.bulk.processes import LocalEngine
from serve.bulk.ray_engine import RayEngine
from tests.bulk.on_ray import WARNINGS, cluster_of, command, files, kill, run
from tests.bulk.test_run import names
from tests.gateway.running import eventually

pytestmark = WARNINGS
FRAMES = [f"{k:04d}.bin" for k in range(11)]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "model.mar"
    path.write_bytes(b"an archive")
    return path


@pytest.fixture
def source(frames: Any, tmp_path: Path) -> Iterator[Path]:
    """Eleven frames in four parts, of which the second waits at a gate."""
    bodies = [b"x" * k for k in range(1, 12)]
    bodies[4] = b"gate %b" % str(tmp_path / "gate").encode()
    yield frames(*bodies)


def at_the_gate(tmp_path: Path) -> psutil.Process:
    """Wait until a worker is at the gate; returns it. Other parts may be finished or not."""
    reached = tmp_path / "gate.reached"
    worker = eventually(lambda: reached.exists() and reached.read_text(), 90)
    return psutil.Process(int(worker))


def test_a_killed_command_leaves_nothing_and_the_other_engine_goes_on(
    source: Path, archive: Path, tmp_path: Path
) -> None:
    out, expected = tmp_path / "out", tmp_path / "expected"
    scratch = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # paths of sockets are short
    (tmp_path / "gate").touch()
    run(source, expected, LocalEngine(("cpu",), 1), archive)
    (tmp_path / "gate").unlink()
    (tmp_path / "gate.reached").unlink()
    with command(source, out, archive, "local", TMPDIR=str(scratch)) as process:
        at_the_gate(tmp_path)
        kill(process)
    eventually(lambda: not list(scratch.iterdir()), 30)
    scratch.rmdir()
    begun = files(out)
    (tmp_path / "gate").touch()
    summary = run(source, out, LocalEngine(("cpu",), 1), archive)
    finished = b"".join(body for name, body in begun.items() if name.endswith(".jsonl"))
    assert summary.computed == 11 - len(finished.splitlines())
    assert files(out) == files(expected)

    for name in ("00000001.jsonl", "00000003.jsonl"):  # as the local engine leaves them when it is killed
        (out / "parts" / name).unlink()
    assert run(source, out, RayEngine(actors=1), archive).computed == 5
    assert files(out) == files(expected) and names(out) == FRAMES


def test_a_lost_head_ends_the_command_with_its_own_status(
    source: Path, archive: Path, tmp_path: Path
) -> None:
    with (
        cluster_of(1) as cluster,
        command(
            source, tmp_path / "out", archive, cluster.address, RAY_gcs_rpc_server_reconnect_timeout_s="2"
        ) as process,
    ):
        at_the_gate(tmp_path)
        cluster.head_node.all_processes["gcs_server"][0].process.kill()
        printed = process.communicate(timeout=90)[0]
        (tmp_path / "gate").touch()
        # Ray waits for the head before its nodes end.
        for node in (cluster.head_node, *cluster.worker_nodes):
            node.kill_all_processes(check_alive=False, allow_graceful=False)
    assert process.returncode == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    summary = run(source, tmp_path / "out", LocalEngine(("cpu",), 1), archive)
    assert summary.counts.frames == 11 and not summary.counts.failed
    assert names(tmp_path / "out") == FRAMES


def test_a_killed_board_costs_no_frame(source: Path, archive: Path, tmp_path: Path) -> None:
    (source / "0008.bin").write_bytes(b"deadly")
    with command(source, tmp_path / "out", archive, "local") as process:
        at_the_gate(tmp_path)
        (board,) = (
            each
            for each in psutil.Process(process.pid).children(recursive=True)
            if each.name().startswith("ray::Board")
        )
        board.kill()
        time.sleep(0.1)
        (tmp_path / "gate").touch()
        assert process.wait(120) == 1, process.communicate()[0]
    assert names(tmp_path / "out") == FRAMES
    failed = [each for each in names(tmp_path / "out") if b"error" in _line(tmp_path / "out", each)]
    assert failed == ["0008.bin"]


def _line(out: Path, name: str) -> bytes:
    lines = b"".join(path.read_bytes() for path in (out / "parts").glob("*.jsonl")).splitlines()
    (found,) = (line for line in lines if b'"%b"' % name.encode() in line)
    return found
