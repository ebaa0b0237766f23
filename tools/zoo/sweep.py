"""Every family tried in a process of its own, with a time limit, a memory limit and a file of results.

The first config of a family is tried first; where it is not a model that answers single frames, or wants a
package, the next ones are, up to `MAX_CONFIGS`. Results are appended to a file of JSON lines as they come, so
that a broken-off sweep goes on where it was. Knows nothing about models: `tools.zoo.probe` does.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tools.zoo.families import Family
from tools.zoo.probe import ProbeResult, run

__all__ = ["Result", "Sweep", "load_results"]

MAX_CONFIGS = 8
# After these the family's next config has a chance; a model that fails or differs is what we want to see.
NEXT_AFTER = ("not a model", "not a per-frame model", "needs package", "broken upstream")
_POLL_S = 0.2


@dataclass(frozen=True)
class Result:
    """What became of one config of a family.

    Attributes:
        family: package and name of the folder.
        position: 0 for the family's first config.
        extra: whether the packages of the ``zoo`` extra were installed.
        verdict: see `tools.zoo.probe.ProbeResult`.
        peak_mb: most memory its process held, MiB.
    """

    family: str
    position: int
    extra: bool
    verdict: ProbeResult
    peak_mb: int = 0


def load_results(path: Path) -> list[Result]:
    """The results in a file, the latest of each config and extra; a last line that was cut off is left out."""
    latest: dict[tuple[str, int, bool], Result] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            raw: dict[str, Any] = json.loads(line)
            raw["verdict"]["packages"] = tuple(raw["verdict"]["packages"])
            result = Result(**{**raw, "verdict": ProbeResult(**raw["verdict"])})
            latest[result.family, result.position, result.extra] = result
    return list(latest.values())


class Sweep:
    """Runs trials, a few at a time.

    Args:
        results: file of JSON lines, appended to; its folder is made.
        extra: whether the packages of the ``zoo`` extra are installed here.
        timeout_s: seconds one config may take.
        memory_mb: MiB its process may hold.
        jobs: configs tried at the same time.
    """

    def __init__(
        self, results: Path, *, extra: bool, timeout_s: float = 900.0, memory_mb: int = 6144, jobs: int = 1
    ) -> None:
        """Start nothing yet."""
        self._path = results
        self._extra = extra
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._jobs = jobs
        # Forked from a process that has imported everything, so that a trial is only the trial.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tools.zoo.preload"])
        self._stop = threading.Event()
        self._writing = threading.Lock()

    def run(self, wanted: Sequence[Family], done: Callable[[Family, Result | None], None]) -> None:
        """Try the families in their order; `done` is called in this thread as each is finished.

        Raises:
            KeyboardInterrupt: passed on after the running trials have been stopped.
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
        """The last result of a family; None where it has no configs."""
        result = None
        for position, config in enumerate(family.configs[:MAX_CONFIGS]):
            if self._stop.is_set():
                break
            result = self._trial(family, position, config)
            if self._stop.is_set():
                break
            with self._writing, self._path.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            if result.verdict.verdict not in NEXT_AFTER:
                break
        return result

    def _trial(self, family: Family, position: int, config: Path) -> Result:
        with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-coverage-") as folder:
            out = Path(folder, "verdict.json")
            log = self._path.parent / "logs" / f"{family.package}-{family.name}-{position}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            process = self._context.Process(target=run, args=(config, out, log))
            process.start()
            peak_mb, ended = self._watch(process)
            if ended:
                return Result(
                    family.key, position, self._extra, ProbeResult(config.stem, "fails", ended), peak_mb
                )
            try:
                raw = json.loads(out.read_text())
                verdict = ProbeResult(**{**raw, "packages": tuple(raw["packages"])})
            except (OSError, ValueError):
                last = f"its process ended with {process.exitcode}; see {log.name}"
                verdict = ProbeResult(config.stem, "fails", last)
            return Result(family.key, position, self._extra, verdict, peak_mb)

    def _watch(self, process: Any) -> tuple[int, str]:
        """Wait for a trial; its peak memory in MiB, and why it was ended if it was."""
        started, peak, ended = time.monotonic(), 0, ""
        try:
            trial = psutil.Process(process.pid)
            trial.nice(10)
        except psutil.NoSuchProcess:
            process.join()
            return peak, ended
        while process.is_alive():
            peak = max(peak, _held_mb(trial))
            if self._stop.is_set():
                ended = "stopped"
            elif peak > self._memory_mb:
                ended = f"it held more than the {self._memory_mb} MiB of the sweep"
            elif time.monotonic() - started > self._timeout_s:
                ended = f"it took longer than the {self._timeout_s:g} s of the sweep"
            if ended:
                _end(trial)
            process.join(_POLL_S)
        # Where the fork server was ended first, nothing tells of its trials any more.
        _end(trial)
        return peak, ended


def _family_of(trial: psutil.Process) -> Iterable[psutil.Process]:
    try:
        return [trial, *trial.children(recursive=True)]
    except psutil.NoSuchProcess:  # also where another process has its number now
        return []


def _held_mb(trial: psutil.Process) -> int:
    total = 0
    for process in _family_of(trial):
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total >> 20


def _end(trial: psutil.Process) -> None:
    for process in _family_of(trial):
        with suppress(psutil.Error):
            process.kill()
