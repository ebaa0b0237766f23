"""The engine on Ray: the same bytes as the local engine's, on clusters of this machine, whatever ends their parts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve.bulk.destination import Destination
from serve.bulk.processes import LocalEngine
from serve.bulk.ray_engine import RayEngine
from serve.errors import SettingsError, SetupError, StorageError
from tests.bulk import fake
from tests.bulk.on_ray import WARNINGS, add_node, cluster_of, files, run
from tests.bulk.test_run import names
from tests.conftest import ROOT
from tests.gateway.running import eventually

pytestmark = WARNINGS


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with cluster_of(0) as started:
        yield started


@pytest.fixture
def nodes(cluster: Any) -> Iterator[list[Any]]:
    """Two nodes of the cluster with one core each."""
    while len(cluster.worker_nodes) < 2:
        add_node(cluster)
    yield list(cluster.worker_nodes)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "model.mar"
    path.write_bytes(b"an archive")
    return path


def test_a_cluster_writes_the_bytes_of_the_local_engine(
    cluster: Any, nodes: Any, frames: Any, archive: Path, tmp_path: Path
) -> None:
    bodies = [b"x" * k for k in range(1, 24)]
    bodies[4], bodies[10], bodies[17] = b"bad", b"deadly", b"once %b" % str(tmp_path / "mark").encode()
    source, shown = frames(*bodies), list[int]()
    expected = run(source, tmp_path / "local", LocalEngine(("cpu",), 1), archive)
    (tmp_path / "mark").unlink()
    found = run(source, tmp_path / "ray", RayEngine(cluster.address), archive, advance=shown.append)
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert found.counts == expected.counts and found.computed == sum(shown) == 23
    assert found.counts.failed == {"undecodable_frame": 1, "inference_failed": 1}
    assert (tmp_path / "ray" / "model.mar").read_bytes() == archive.read_bytes()


def test_a_lost_node_costs_no_frame(
    cluster: Any, nodes: list[Any], frames: Any, archive: Path, tmp_path: Path
) -> None:
    gate, out = tmp_path / "gate", tmp_path / "out"
    bodies = [b"x" * k for k in range(1, 24)]
    bodies[7] = b"gate %b" % str(gate).encode()
    source = frames(*bodies)
    before = list[int]()

    def lose_a_node() -> None:
        reached = tmp_path / "gate.reached"
        worker = psutil.Process(int(eventually(lambda: reached.exists() and reached.read_text(), 60)))
        before.append(len(names(out)))
        above = {each.pid for each in worker.parents()}
        (node,) = (each for each in nodes if each.all_processes["raylet"][0].process.pid in above)
        cluster.remove_node(node, allow_graceful=False)
        worker.wait(30)
        gate.touch()

    thread = threading.Thread(target=lose_a_node)
    thread.start()
    summary = run(source, out, RayEngine(cluster.address), archive)
    thread.join()
    print(f"lines when the node was lost: {before[0]}, at the end: {len(names(out))} of {len(bodies)}")
    assert before[0] < 23 and len(cluster.worker_nodes) == 1
    assert names(out) == [f"{k:04d}.bin" for k in range(23)] and not summary.counts.failed
    assert not list((out / "parts").glob(".unfinished-*"))


def test_a_model_that_cannot_be_loaded_ends_the_run(
    cluster: Any, nodes: Any, frames: Any, archive: Path, tmp_path: Path
) -> None:
    with pytest.raises(SetupError):
        run(frames(b"1"), tmp_path / "out", RayEngine(cluster.address), archive, open_model=fake.open_broken)
    with pytest.raises(SetupError):
        run(frames(b"1"), tmp_path / "out", RayEngine(cluster.address), archive, open_model=fake.open_dying)


class _Unshared(Destination):
    """Has another description of the run than the folder of the nodes."""

    def read(self, name: str) -> bytes | None:
        found = super().read(name)
        return found and found + b" "


def test_folders_that_are_not_shared_are_an_error(
    cluster: Any, nodes: Any, frames: Any, archive: Path, tmp_path: Path
) -> None:
    source, out = frames(b"1"), tmp_path / "out"
    with pytest.raises(SettingsError):
        run(source, out, RayEngine(cluster.address), archive, destination=_Unshared(str(out)))
    source.rename(tmp_path / "elsewhere")
    with pytest.raises(SettingsError):
        run(source, out, RayEngine(cluster.address), archive)
    assert not names(out)


def test_an_altered_archive_is_not_loaded(
    cluster: Any, nodes: Any, frames: Any, archive: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.mar"
    other.write_bytes(b"another archive")
    with pytest.raises(StorageError):
        run(frames(b"1"), tmp_path / "out", RayEngine(cluster.address, archive_uri=str(other)), archive)


def test_a_stopped_run_leaves_no_process_and_no_file_of_ray(
    frames: Any, archive: Path, tmp_path: Path
) -> None:
    gate, out = tmp_path / "gate", tmp_path / "out"
    source = frames(b"1", b"2", b"3", b"gate %b" % str(gate).encode())
    script = (
        "from pathlib import Path; from serve.bulk.ray_engine import RayEngine; from serve.cli.serve import stoppable\n"
        "from tests.bulk.on_ray import run\n"
        f"with stoppable(): run(Path({str(source)!r}), Path({str(out)!r}), RayEngine(actors=1), Path({str(archive)!r}))"
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PYTHONPATH": str(ROOT),
        "TMPDIR": tempfile.mkdtemp(prefix="ray-", dir="/tmp"),
    }
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        eventually((tmp_path / "gate.reached").exists, 60)
        # The gate can be reached before the parts of the first frames are moved to their place.
        eventually(lambda: len(names(out)) == 3, 60)
        below = psutil.Process(process.pid).children(recursive=True)
        addresses = {
            each.laddr.ip for one in below for each in one.net_connections("inet") if each.status == "LISTEN"
        }
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode and b"KeyboardInterrupt" in printed
    assert addresses and addresses <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert not psutil.wait_procs(below, timeout=10)[1]
    assert not os.listdir(environment["TMPDIR"])
    os.rmdir(environment["TMPDIR"])
    assert names(out) == [f"{k:04d}.bin" for k in range(3)]
