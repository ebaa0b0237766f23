"""The runtime alone and `serve.bulk` on the same frames, each timed from the moment all its processes have a model.

The runtime gets bytes that are in memory, decodes them and computes them in batches, one after the other; that is what
`Detector` does for anyone. The run over many frames reads files, decodes them, computes and writes its parts, by either
of its engines.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

from serve.bulk.destination import Destination
from serve.bulk.parts import Counts, Engine, Job, Part
from serve.bulk.processes import LocalEngine
from serve.bulk.ray_driver import LOCAL
from serve.bulk.ray_engine import RayEngine
from serve.bulk.run import BulkRun, Plan, execute, plan_run
from serve.predict.models import Model, open_archive, outcome_of
from serve.predict.sources import open_source
from serve.protocol.batch import Body
from serve.protocol.frame_spec import Modality
from serve.protocol.options import FrameOptions
from serve.protocol.worker import Outcome

__all__ = [
    "ENGINES",
    "SLEEP",
    "EngineTiming",
    "Setting",
    "Timing",
    "bulk_rate",
    "engine_of",
    "engine_timing",
    "runtime_rate",
]

SLEEP = "sleep"  # in place of an archive: a model that takes 20 ms for a batch and 2 ms for each frame
_BATCH_S, _FRAME_S = 0.020, 0.002
_POLL_S = 0.001
_WAIT_S = 300.0  # of a process for the others to have their models
#: Names of the engines; the first is what the others are compared with.
ENGINES = ("local", "ray")
# Of 40 boxes, as a street has them.
_ANSWER: dict[str, Any] = {
    "bboxes_3d": [[1.2345678, -2.3456789, 0.1234567, 3.9, 1.6, 1.56, 1.5707963]] * 40,
    "scores_3d": [0.1234567] * 40,
    "labels_3d": [2] * 40,
    "names": ["Car"] * 40,
}


@dataclass(frozen=True)
class Setting:
    """What both sides do.

    Attributes:
        archive: path of the archive, or `SLEEP`.
        frame: path of the frame that they get again and again.
        modality: kind of the frame.
        frames: frames of one measurement, all processes together.
        batch_size: frames per batch.
        part_frames: frames per part of the results.
        processes: processes side by side.
        threads: torch threads of each.
        device: of all of them.
    """

    archive: str
    frame: Path
    modality: Modality
    frames: int
    batch_size: int
    part_frames: int
    processes: int
    threads: int
    device: str


@dataclass(frozen=True)
class Timing:
    """Frames per second once all processes have loaded the model, their CPU time per frame, seconds until then."""

    rate: float
    cpu_s: float
    startup_s: float


@dataclass(frozen=True)
class EngineTiming:
    """One run of an engine, in the command's clock.

    Attributes:
        rate: frames per second from the moment all processes have a model until the last part is finished.
        start_s: seconds from the beginning until all processes have a model and have computed a batch.
        first_part_s: seconds from the beginning until the first part is finished.
        end_s: seconds from the last part until the engine has ended what it started.
        whole_s: seconds of all of it.
    """

    rate: float
    start_s: float
    first_part_s: float
    end_s: float
    whole_s: float

    @classmethod
    def of(
        cls, frames: int, begun: float, ready: float, parts: Sequence[float], ended: float
    ) -> EngineTiming:
        """Calculate from the moments, seconds of one clock, at which things happened.

        Args:
            frames: of the run.
            begun: the run began.
            ready: the last process had its model.
            parts: each part was finished, in order.
            ended: the run returned.
        """
        return cls(
            frames / (parts[-1] - ready), ready - begun, parts[0] - begun, ended - parts[-1], ended - begun
        )


def runtime_rate(setting: Setting) -> Timing:
    """Let processes compute batches from memory."""
    with tempfile.TemporaryDirectory() as folder:
        _write_stage(Path(folder), setting)
        begun = time.monotonic()
        with ProcessPoolExecutor(setting.processes, get_context("spawn")) as pool:
            share = -(-setting.frames // setting.processes)
            runs = [pool.submit(_run_alone, folder, setting, share) for _ in range(setting.processes)]
            results = [run.result() for run in runs]
        ended, cpu_s = max(end for end, _ in results), sum(cpu for _, cpu in results)
        ready, ready_cpu_s = _all_ready_at(Path(folder))
        frames = share * setting.processes
        return Timing(frames / (ended - ready), (cpu_s - ready_cpu_s) / frames, ready - begun)


def bulk_rate(setting: Setting, out: str | None = None) -> Timing:
    """Let `serve.bulk` compute as many frames of a folder.

    Args:
        setting: what to do.
        out: ``s3://bucket/prefix`` for the results; a temporary folder if None.
    """
    with _planned(setting, out) as (stage, run, plan, destination):
        cpu_s: dict[int | None, float] = {}

        def advance(frames: int) -> None:
            for child in active_children():
                with suppress(OSError):
                    cpu_s[child.pid] = _cpu_s_of(child.pid)

        begun = time.monotonic()
        _execute(run, plan, destination, engine_of(ENGINES[0], setting), advance)
        ended = time.monotonic()
        ready, ready_cpu_s = _all_ready_at(stage)
        spent_s = sum(cpu_s.values()) - ready_cpu_s
        return Timing(setting.frames / (ended - ready), spent_s / setting.frames, ready - begun)


def engine_of(name: str, setting: Setting) -> Engine:
    """Make an engine, one of `ENGINES`, that computes in the setting's number of processes.

    Raises:
        SetupError: Ray is not installed.
    """
    if name == ENGINES[0]:
        return LocalEngine((setting.device,) * setting.processes, setting.threads)
    return RayEngine(LOCAL, device=setting.device.partition(":")[0], actors=setting.processes)


def engine_timing(
    setting: Setting, name: str, out: str | None = None, advance: Callable[[int], None] = lambda frames: None
) -> EngineTiming:
    """Let one of `ENGINES` compute the frames of a folder.

    Args:
        setting: what to do. Ray's actors have one thread each on the CPU.
        name: of the engine.
        out: ``s3://bucket/prefix`` for the results; a temporary folder if None.
        advance: gets the number of frames that were begun since the last call.
    """
    with _planned(setting, out) as (stage, run, plan, destination):
        engine = _TimedEngine(engine_of(name, setting))
        begun = time.monotonic()
        _execute(run, plan, destination, engine, advance)
        ended = time.monotonic()
        return EngineTiming.of(setting.frames, begun, _all_ready_at(stage)[0], engine.finished_at, ended)


class _TimedEngine:
    """Notes when each part of another engine is finished."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.finished_at: list[float] = []

    def compute(
        self, parts: Iterator[Part], job: Job, destination: Destination, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, Counts]]:
        """See `Engine.compute`."""
        for result in self._engine.compute(parts, job, destination, advance):
            self.finished_at.append(time.monotonic())
            yield result


@contextmanager
def _planned(setting: Setting, out: str | None) -> Iterator[tuple[Path, BulkRun, Plan, Destination]]:
    """Make a folder with the frames and plan a run over them; all of it is removed at the end."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stage = Path(folder)
        _write_stage(stage, setting)
        source = stage / "frames"
        source.mkdir()
        for k in range(setting.frames):
            (source / f"{k:06d}{setting.frame.suffix}").symlink_to(setting.frame.resolve())
        destination = Destination(out or str(stage / "out"))
        job = Job(str(stage / "model"), False, FrameOptions(), setting.batch_size, _open_measured)
        run = BulkRun(job, {"bench": 1}, setting.part_frames)
        plan = plan_run(
            run, destination, lambda: open_source(source, setting.modality), stack, overwrite=True
        )
        yield stage, run, plan, destination


def _execute(
    run: BulkRun, plan: Plan, destination: Destination, engine: Engine, advance: Callable[[int], None]
) -> None:
    summary = execute(run, plan, destination, engine, advance)
    if summary.counts.failed:
        raise RuntimeError(f"frames failed: {summary.counts.failed}")


def _write_stage(stage: Path, setting: Setting) -> None:
    """Prepare what processes find beside their archive."""
    (stage / "warm-up").symlink_to(setting.frame.resolve())
    (stage / "processes").write_text(f"{setting.processes} {setting.batch_size}")
    (stage / "ready").mkdir()
    # A file that names the archive, not a link to it: Ray's engine takes the hash of what it hands out.
    (stage / "model").write_text(
        setting.archive if setting.archive == SLEEP else os.path.abspath(setting.archive)
    )


def _all_ready_at(stage: Path) -> tuple[float, float]:
    """Return when the last process had its model, and the CPU time of all until then."""
    found = [tuple(map(float, file.read_text().split())) for file in (stage / "ready").glob("*.at")]
    return max(at for at, _ in found), sum(cpu_s for _, cpu_s in found)


def _cpu_s_of(process: int | None) -> float:
    """Read the CPU time of another process, all its threads together, seconds."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _open_measured(archive: Path, device: str, *, trust_code: bool, threads: int) -> Model:
    """Open a model, run a batch, which compiles and fills caches, and wait for the other processes."""
    stage, opened = archive.parent, archive.read_text()
    model: Model = (
        _SleepModel()
        if opened == SLEEP
        else open_archive(Path(opened), device, trust_code=trust_code, threads=threads)
    )
    processes, batch_size = map(int, (stage / "processes").read_text().split())
    _compute(model, (stage / "warm-up").read_bytes(), batch_size)
    mark = stage / "ready" / f"{os.getpid()}.writing"
    mark.write_text(f"{time.monotonic()} {time.process_time()}")
    mark.rename(mark.with_suffix(".at"))
    latest = time.monotonic() + _WAIT_S
    while (found := len(list((stage / "ready").glob("*.at")))) < processes:
        if time.monotonic() > latest:
            raise RuntimeError(f"{found} of {processes} processes have a model after {_WAIT_S:g} s")
        time.sleep(_POLL_S)
    return model


def _run_alone(folder: str, setting: Setting, frames: int) -> tuple[float, float]:
    """Compute `frames` frames from memory; returns when that ended, by the monotonic clock, and the CPU time."""
    model = _open_measured(Path(folder, "model"), setting.device, trust_code=False, threads=setting.threads)
    body = setting.frame.read_bytes()
    for first in range(0, frames, setting.batch_size):
        _compute(model, body, min(setting.batch_size, frames - first))
    ended, cpu_s = time.monotonic(), time.process_time()
    model.close()
    return ended, cpu_s


def _compute(model: Model, body: Body, count: int) -> None:
    """Decode and compute one batch, one step after the other."""
    prepared: list[Future[Any]] = []
    for _ in range(count):
        prepared.append(Future())
        prepared[-1].set_result(model.prepare(body, FrameOptions()))
    for outcome in model.submit(prepared).result():
        if isinstance(outcome, Exception):
            raise outcome


class _SleepModel:
    """Model of known cost, without CPU use, like a GPU."""

    modality: Modality = "lidar"
    load_dim = 4
    is_remote = False
    identity = MappingProxyType({"name": "sleep", "version": "1.0"})
    description = MappingProxyType({"modality": "lidar", "load_dim": 4})

    def __init__(self) -> None:
        self._engine = ThreadPoolExecutor(1)

    def prepare(self, body: Body, options: FrameOptions) -> Body:
        """Take a frame as it is."""
        return body

    def submit(self, prepared: Sequence[Future[Any]]) -> Future[list[Outcome]]:
        """Queue a batch."""
        return self._engine.submit(self._run, prepared)

    def _run(self, prepared: Sequence[Future[Any]]) -> list[Outcome]:
        sizes = [len(outcome_of(each)) for each in prepared]
        time.sleep(_BATCH_S + _FRAME_S * len(sizes))
        return [{**_ANSWER, "bytes": size} for size in sizes]

    def close(self) -> None:
        """End its thread."""
        self._engine.shutdown()
