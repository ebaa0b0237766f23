"""What tests of the engine on Ray share: clusters of this machine, and runs on them in this process or another."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

# Before Ray is imported: it listens on loopback alone then, and takes 127.0.0.1 for an address of a cluster.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
pytest.importorskip("ray", reason="needs Ray")

from ray.cluster_utils import Cluster

from serve.bulk.destination import Destination
from serve.bulk.parts import Engine, Job
from serve.bulk.run import BulkRun, Summary, execute, plan_run
from serve.predict.sources import open_source
from serve.protocol.options import FrameOptions
from tests.bulk import fake
from tests.conftest import ROOT

LOOPBACK = "127.0.0.1"
PART_FRAMES = 3
#: Of modules with tests on Ray, which warns of what it does itself.
WARNINGS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
# A run as the command has it: exit status, signals. Arguments: source, out, archive, address of Ray or "processes".
_COMMAND = """
import sys
from pathlib import Path
from serve.bulk.processes import LocalEngine
from serve.bulk.ray_engine import RayEngine
from serve.cli.entry import run as ended
from serve.cli.serve import stoppable
from tests.bulk import fake
from tests.bulk.on_ray import run
source, out, archive, address, model = sys.argv[1:]
def command(argv):
    engine = LocalEngine(("cpu",) * 2, 1) if address == "processes" else RayEngine(address)
    with stoppable():
        summary = run(source, out, engine, Path(archive), open_model=getattr(fake, model))
    return 1 if summary.counts.failed else 0
raise SystemExit(ended(command))
"""


@contextmanager
def cluster_of(nodes: int) -> Iterator[Any]:
    """A head without cores and nodes of one core each; all on loopback."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # paths of sockets are short
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_TMPDIR", folder)  # also of the file that names the last cluster
    started = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "node_ip_address": LOOPBACK,
            "_system_config": {
                "health_check_initial_delay_ms": 0,
                "health_check_period_ms": 500,
                "health_check_failure_threshold": 2,
            },
        },
    )
    try:
        for _ in range(nodes):
            add_node(started)
        yield started
    finally:
        started.shutdown()
        patch.undo()
        shutil.rmtree(folder, ignore_errors=True)


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, node_ip_address=LOOPBACK, object_store_memory=80 << 20)


def run(
    source: Path | str,
    out: Path | str,
    engine: Engine,
    archive: Path,
    *,
    open_model: Any = fake.open_echo,
    advance: Callable[[int], None] = lambda frames: None,
    destination: Destination | None = None,
    part_frames: int = PART_FRAMES,
) -> Summary:
    destination = destination or Destination(str(out))
    task = BulkRun(Job(str(archive), False, FrameOptions(), 2, open_model), {"model": "one"}, part_frames)
    with ExitStack() as stack:
        plan = plan_run(task, destination, lambda: open_source(source, "lidar"), stack, overwrite=False)
        return execute(task, plan, destination, engine, advance)


@contextmanager
def command(
    source: Path | str, out: Path | str, archive: Path, address: str, model: str = "open_echo", **more: str
) -> Iterator[subprocess.Popen[str]]:
    """A run in a process of its own, which is killed at the end of the block; `more` are environment variables."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PYTHONPATH": str(ROOT),
        **more,
    }
    arguments = [str(source), str(out), str(archive), address, model]
    with subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a run; what it has started has to end by itself."""
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert not psutil.wait_procs(below, timeout=30)[1]


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "parts").iterdir()}
