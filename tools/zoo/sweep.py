"""Probe every family in a process of its own, with limits on time and memory, and record the results.

The first config of a family is probed first. If it is not a per-frame model, or needs a package, the next ones follow,
up to `MAX_CONFIGS`. Results are appended to a file of JSON lines, so that an interrupted sweep resumes.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from tools.zoo.families import Family
from tools.zoo.probe import ProbeResult, run

__all__ = ["Result", "Sweep", "load_results"]

MAX_CONFIGS = 8
# The family's next config follows after these; failures and deviations are results to report.
NEXT_AFTER = ("not a model", "not a per-frame model", "needs package", "broken upstream")
_POLL_S = 0.2


@dataclass(frozen=True)
class Result:
    """Result of one config of a family.

    Attributes:
        family: package and name of the folder.
        position: 0 for the family's first config.
        extra: whether the packages of the ``zoo`` extra were installed.
        probe: see `tools.zoo.probe.ProbeResult`.
        peak_mb: most memory its process held, MiB.
        commit: of the sources that it was probed with; empty if unknown.
    """

    family: str
    position: int
    extra: bool
    probe: ProbeResult
    peak_mb: int = 0
    commit: str = ""


def load_results(path: Path) -> list[Result]:
    """Load the latest result of each config and extra from a file; an incomplete last line is skipped."""
    latest: dict[tuple[str, int, bool], Result] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            raw: dict[str, Any] = json.loads(line)
            if "verdict" in raw:  # results of 0.1.0
                raw["probe"] = raw.pop("verdict")
                raw["probe"]["status"] = raw["probe"].pop("verdict")
            raw["probe"]["packages"] = tuple(raw["probe"]["packages"])
            result = Result(**{**raw, "probe": ProbeResult(**raw["probe"])})
            latest[result.family, result.position, result.extra] = result
    return list(latest.values())


class Sweep:
    """Runner of probes, a few in parallel.

    Args:
        results: file of JSON lines, appended to; its folder is made.
        extra: whether the packages of the ``zoo`` extra are installed here.
        timeout_s: seconds one config may take.
        memory_mb: MiB its process may hold.
        jobs: configs tried at the same time.
        served: see `tools.zoo.probe.try_config`.
        commit: recorded with the results.
    """

    def __init__(
        self,
        results: Path,
        *,
        extra: bool,
        timeout_s: float = 900.0,
        memory_mb: int = 8192,
        jobs: int = 1,
        served: bool = False,
        commit: str = "",
    ) -> None:
        """Start nothing yet."""
        self._commit = commit
        self._path = results
        self._extra = extra
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._jobs = jobs
        self._served = served
        # Forked from a process that has imported everything, so that a probe takes no import time.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tools.zoo.preload"])
        self._stop = threading.Event()
        self._writing = threading.Lock()

    def run(self, wanted: Sequence[Family], done: Callable[[Family, Result | None], None]) -> None:
        """Try the families in their order; `done` is called in this thread as each is finished.

        Raises:
            KeyboardInterrupt: passed on after the running probes have been stopped.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self._jobs) as pool:
            futures = {pool.submit(self._family, family): family for family in wanted}
            try:
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BaseException:
                self._stop.set()
                for future in futures:
                    future.cancel()
                raise

    def _family(self, family: Family) -> Result | None:
        """Probe a family; returns its last result, None without configs."""
        result = None
        for position, config in enumerate(family.configs[:MAX_CONFIGS]):
            if self._stop.is_set():
                break
            result = replace(self._probe(family, position, config), commit=self._commit)
            if self._stop.is_set():
                break
            with self._writing, self._path.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            if result.probe.status not in NEXT_AFTER:
                break
        return result

    def _probe(self, family: Family, position: int, config: Path) -> Result:
        with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-coverage-") as folder:
            out = Path(folder, "probe.json")
            log = self._path.parent / "logs" / f"{family.package}-{family.name}-{position}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            process = self._context.Process(target=run, args=(config, out, log, self._served))
            process.start()
            peak_mb, ended = self._watch(process)
            if ended:
                return Result(
                    family.key, position, self._extra, ProbeResult(config.stem, "fails", ended), peak_mb
                )
            try:
                raw = json.loads(out.read_text())
                probe = ProbeResult(**{**raw, "packages": tuple(raw["packages"])})
            except (OSError, ValueError):
                last = f"its process ended with {process.exitcode}; see {log.name}"
                probe = ProbeResult(config.stem, "fails", last)
            return Result(family.key, position, self._extra, probe, peak_mb)

    def _watch(self, process: Any) -> tuple[int, str]:
        """Wait for a probe; returns its peak memory in MiB and the reason if it was killed."""
        started, peak, ended = time.monotonic(), 0, ""
        try:
            probe = psutil.Process(process.pid)
            probe.nice(10)
        except psutil.NoSuchProcess:
            process.join()
            return peak, ended
        while process.is_alive():
            peak = max(peak, _memory_mb(probe))
            if self._stop.is_set():
                ended = "stopped"
            elif peak > self._memory_mb:
                ended = f"it held more than the {self._memory_mb} MiB of the sweep"
            elif time.monotonic() - started > self._timeout_s:
                ended = f"it took longer than the {self._timeout_s:g} s of the sweep"
            if ended:
                _kill(probe)
            process.join(_POLL_S)
        # If the fork server died first, its children are not reported any more.
        _kill(probe)
        return peak, ended


def _process_tree(probe: psutil.Process) -> Iterable[psutil.Process]:
    try:
        return [probe, *probe.children(recursive=True)]
    except psutil.NoSuchProcess:  # or its pid was reused
        return []


def _memory_mb(probe: psutil.Process) -> int:
    total = 0
    for process in _process_tree(probe):
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total >> 20


def _kill(probe: psutil.Process) -> None:
    for process in _process_tree(probe):
        with suppress(psutil.Error):
            process.kill()
