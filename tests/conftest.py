"""Fixtures for all tests: free ports, archives, a watch for what tests leave behind; docs/testing.md has the tiers.

Under pytest-xdist every file has a group, and a group stays in one process: files with tests of real servers share
one, so that no two servers compete for the cores, those with tests that measure time share another, and any other file
is a group of its own, so that a fixture of a module is made once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import orjson
import psutil
import pytest
from filelock import FileLock

from serve import ops
from tests.fork_server import ForkServer
from tests.worker.context import Context

ops.install()

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "serve" / "assets"
DEMO_CONFIG, DEMO_CHECKPOINT = ASSETS / "second_demo.py", ASSETS / "second_demo.pth"


@pytest.fixture
def free_ports() -> Callable[[int], list[int]]:
    """`free_ports(3)`: that many different ports of 127.0.0.1 on which nothing listens."""
    return pick_free_ports


def pick_free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def write_archive(
    path: Path,
    handler: str,
    name: str | None = None,
    version: str = "1.0",
    files: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """A minimal TorchServe archive that names the module of a handler and holds `files` besides."""
    model = {"modelName": name or path.stem, "modelVersion": version, "handler": handler}
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))
        for each, text in files.items():
            archive.writestr(each, text)
    return path


def accept_ctrl_c() -> None:
    """As `preexec_fn`: let SIGINT end the child, also if we run in the background of a shell and ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.import_plugin("tests.no_skips")
    parser.addoption(
        "--duration",
        type=float,
        default=600.0,
        help="seconds of the run at volume (tests/gateway/test_volume.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Every process of a parallel run carries this identifier in its environment: `pytest_sessionfinish` looks for it.
    if hasattr(config.option, "testrunuid") and not config.option.testrunuid:
        config.option.testrunuid = uuid.uuid4().hex
    share_the_cores(int(getattr(config.option, "numprocesses", None) or 0))


def share_the_cores(count: int) -> None:
    """Divide the cores between `count` processes that test side by side, and what these start.

    Each would take all cores otherwise, and OpenMP's threads wait for each other by spinning: two networks with two
    threads each took 16 times the CPU time, on two cores, of two with one thread each, and 20 times as long.
    """
    if count:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for what asks for more threads


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let files go first that start servers, then slow ones, so that no process has one left at the end."""

    def rank(item: pytest.Item) -> int:
        return 0 if item.get_closest_marker("torchserve") else 1 if item.get_closest_marker("slow") else 2

    files: dict[Path, int] = {}
    for item in items:
        files[item.path] = min(files.get(item.path, 2), rank(item))
    items.sort(key=lambda item: files[item.path])


@functools.cache
def group_of(path: str) -> str:
    """The group of a test file, by the markers in it."""
    text = (ROOT / path).read_text()
    return next((name for name in ("torchserve", "timing") if f"pytest.mark.{name}" in text), path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out whole groups of files.

    Not by xdist's own groups: xdist 3.8 writes them into `Item._nodeid`, which pytest 9.2 no longer reads.
    """
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    return GroupScheduling(config, log)


@pytest.fixture(autouse=True)
def the_default_scope_is_restored() -> Iterator[None]:
    """Keep mmengine's default scope, which is one of the process, from deciding how the next test builds."""
    registries = sys.modules.get("mmengine.registry")
    before = dict(registries.DefaultScope._instance_dict) if registries else {}
    yield
    if registries := sys.modules.get("mmengine.registry"):
        registries.DefaultScope._instance_dict.clear()
        registries.DefaultScope._instance_dict.update(before)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the session if a process started by a test outlives all tests (of this process of a parallel run)."""
    yield
    left = _processes_naming(tmp_path_factory.getbasetemp())
    left += psutil.Process().children(recursive=True)
    assert not (described := _described(left)), "tests left processes running:\n" + "\n".join(described)


@pytest.fixture(scope="session", autouse=True)
def proofs_are_forked(nothing_is_left_running: None) -> Iterator[None]:
    """Let conversions of this process fork what proves the archive; not those of tests marked ``fresh_proof``.

    Nor any on a machine with CUDA: mmengine's import looks for a device, after which a fork cannot use one (PyTorch's
    note on multiprocessing, "Poison fork").
    """
    import torch

    from serve.convert import proof

    servers: dict[str, ForkServer] = {}
    start_anew = proof.start_process

    def fork(package: str, *arguments: Any) -> Any:
        if fresh_proof.is_set() or torch.cuda.is_available():
            return start_anew(package, *arguments)
        if package not in servers:
            servers[package] = ForkServer(package)
        return servers[package].start(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "start_process", fork)
        yield
    for server in servers.values():
        server.stop()


fresh_proof = threading.Event()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures, which may convert, too."""
    (fresh_proof.set if item.get_closest_marker("fresh_proof") else fresh_proof.clear)()


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Fail a parallel run if anything outlives its processes: a killed one cannot look for what it left."""
    yield
    run = getattr(session.config.option, "testrunuid", None)
    if "PYTEST_XDIST_WORKER" in os.environ or not getattr(session.config.option, "numprocesses", None):
        return
    left = _processes_naming(session.config._tmp_path_factory.getbasetemp())
    left += [
        process
        for process in psutil.process_iter()
        if _environment(process, "PYTEST_XDIST_TESTRUNUID") == run
    ]
    if described := _described(left):
        print("\ntests left processes running:\n" + "\n".join(described))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _processes_naming(folder: Path) -> list[psutil.Process]:
    """Processes with a path below `folder` on their command line."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(f"{folder}{os.sep}" in word for word in process.info["cmdline"] or ())
    ]


def _environment(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name)
    except psutil.Error:
        return None


def _described(processes: list[psutil.Process]) -> list[str]:
    """One line per process that still runs, without our own and Python's helper of multiprocessing."""
    lines = {}
    for process in processes:
        try:
            command = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if command and "resource_tracker" not in command and process.pid != os.getpid():
            lines[process.pid] = f"{process.pid}: {command[:200]}"
    return list(lines.values())


def kept_folder(config: pytest.Config, name: str, *sources: Path) -> Path | None:
    """A folder in pytest's cache for something that depends only on the files below `sources` and on what is installed.

    What was made of other files under the same name is removed. None without pytest's cache (``-p no:cacheprovider``).
    """
    if (cache := getattr(config, "cache", None)) is None:
        return None
    digest = hashlib.sha256()
    for package in ("torch", "mmcv-lite", "mmdet", "mmdet3d", "numba"):
        digest.update(f"{package} {version(package)}\n".encode())
    files = (path for source in sources for path in (source.rglob("*") if source.is_dir() else [source]))
    for path in sorted(path for path in files if path.is_file()):
        if "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    place = cache.mkdir(name)
    with FileLock(place / "lock"):
        for former in place.iterdir():
            if former.is_dir() and former.name != digest.hexdigest():
                shutil.rmtree(former)
        (place / digest.hexdigest()).mkdir(exist_ok=True)
    return place / digest.hexdigest()


# What the wheel is made of.
WHEEL_SOURCES = (
    "pyproject.toml",
    "setup.py",
    "LICENSE",
    "README.md",
    "tools/__init__.py",
    "tools/setup_env.py",
)
WHEEL_FOLDERS = ("serve", "handlers", "requirements", "tools/environment")


def copy_sources_of_wheel(copy: Path) -> None:
    """Copy all that a wheel is built of, so that nothing is written into the checkout."""
    for name in WHEEL_FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in WHEEL_SOURCES:
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)


@pytest.fixture(scope="session")
def wheel(pytestconfig, tmp_path_factory) -> Path:
    """The project's wheel, built of a copy of its sources; made anew only if they changed."""
    kept = kept_folder(pytestconfig, "wheel", *(ROOT / name for name in (*WHEEL_SOURCES, *WHEEL_FOLDERS)))
    kept = kept or tmp_path_factory.mktemp("wheel")
    with FileLock(kept / "lock"):
        if not list(kept.glob("*.whl")):
            copy = tmp_path_factory.mktemp("sources")
            copy_sources_of_wheel(copy)
            command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
            command += ["--no-build-isolation", "--wheel-dir", str(kept / "unfinished"), str(copy)]
            subprocess.run(command, check=True, cwd=copy, capture_output=True)
            (made,) = (kept / "unfinished").glob("*.whl")
            made.rename(kept / made.name)
            (kept / "unfinished").rmdir()
    (path,) = kept.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def demo_mar(pytestconfig, tmp_path_factory, store) -> Path:
    """The archive of the demo SECOND; made anew only if the code or the environment changed."""
    from serve.convert import Conversion, convert

    kept = kept_folder(pytestconfig, "demo-archive", ROOT / "serve", ROOT / "handlers")
    kept = kept or tmp_path_factory.mktemp("demo-archive")
    with FileLock(kept / "lock"):
        if not (kept / "second.mar").exists():
            made = convert(
                Conversion(DEMO_CONFIG, DEMO_CHECKPOINT, tmp_path_factory.mktemp("made"), "second")
            )
            shutil.copy(made.path, kept / "unfinished")
            (kept / "unfinished").rename(kept / "second.mar")
    # A copy, so that no test can spoil what the next session takes.
    return Path(shutil.copy(kept / "second.mar", store))


@pytest.fixture(scope="session")
def demo_archive(demo_mar, tmp_path_factory):
    from serve import archive

    return archive.extract(demo_mar, tmp_path_factory.mktemp("opened"))


@pytest.fixture(scope="session")
def detector(demo_archive):
    import torch

    from serve.runtime import load_detector

    return load_detector(demo_archive, torch.device("cpu"))


@pytest.fixture(scope="session")
def street() -> np.ndarray:
    """A synthetic street of some 17,000 points with cars in it."""
    return np.fromfile(ASSETS / "sample.bin", dtype=np.float32).reshape(-1, 4)


@pytest.fixture(scope="session")
def handler(demo_archive):
    from handlers.mmdet3d_handler import MMDet3DHandler

    handler = MMDet3DHandler()
    handler.initialize(Context(demo_archive.root))
    return handler


@pytest.fixture
def ask(handler, demo_archive):
    """Call the handler; returns [(status, document)] per row."""

    def call(*rows, headers=()):
        context = Context(demo_archive.root, headers=headers)
        answers = handler.handle(
            [{"body": row} if not isinstance(row, dict) else row for row in rows], context
        )
        assert len(answers) == len(rows) == len(context.status)
        assert set(context.response_headers.values()) == {"application/json"}
        return [(context.status[i][0], orjson.loads(answer)) for i, answer in enumerate(answers)]

    return call
