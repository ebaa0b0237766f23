"""TorchServe and the gateway as one service: start, watch, drain, end.

TorchServe starts first, with every archive that can be served; then the gateway, which reports those that were
rejected. The gateway inherits its listening socket, reads its options as one JSON document from standard input, and
prints its URL once it takes connections. The end of either ends the other. Stopping drains: the gateway stops
admitting and answers what is in flight, and only then TorchServe, which would drop it, is stopped. Used by
``mmdet3d-serve serve``, ``mmdet3d-serve demo`` and the image alike.
"""

from __future__ import annotations

import contextlib
import json
import logging
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from serve import archive
from serve.errors import ArchiveError, BackendStartError, ModelNotLoaded, ServeError, SettingsError
from serve.gateway.listener import bind
from serve.gateway.options import GatewayOptions
from serve.settings.environment import child_environment, die_with_parent
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from serve.torchserve.config import url
from serve.torchserve.process import KEY_FILE

__all__ = ["Rejected", "Service", "archives_of", "examine", "gateway_options"]

_POLL_S = 0.25
# What the gateway may need beyond its own limits to end: the interpreter's own way out.
_EXIT_S = 5.0
_GATEWAY_START_S = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rejected:
    """An archive that is not served, and why."""

    archive: str
    reason: str


def archives_of(store: Path, workers: int) -> list[ServedModel]:
    """Every archive of a store, by file name.

    Raises:
        SettingsError: there is none.
    """
    found = sorted(path.name for path in store.glob("*.mar"))
    models = []
    for name in found:
        try:
            models.append(ServedModel(name, workers=workers))
        except (SettingsError, ValueError):
            logger.error(
                "%r is rejected: its name has other than letters, digits, '.', '_', '+' and '-'", name
            )
    if not models:
        raise SettingsError(f"{store} holds no archive; make one with `make archive MODEL=second`")
    return models


def examine(store: Path, models: Sequence[ServedModel]) -> tuple[list[ServedModel], list[Rejected]]:
    """Check every hash of every archive: those that can be served, and those that are rejected.

    Of several archives with one name and version the first is served.
    """
    good: list[ServedModel] = []
    rejected: list[Rejected] = []
    files: dict[tuple[str, str], str] = {}
    for model in models:
        try:
            metadata = archive.verify(store / model.archive)
            name = model.name or metadata.name
            former = files.setdefault((name, metadata.version), model.archive)
            if former != model.archive:
                raise ArchiveError(
                    f"{former} is also {name} {metadata.version}; serve one under another name, as in "
                    f"--models {name}2={model.archive}"
                )
            good.append(model)
        except Exception as error:  # whatever it is, the other archives are served
            reason = str(error) if isinstance(error, ServeError) else f"{type(error).__name__}: {error}"
            rejected.append(Rejected(model.archive, reason))
    return good, rejected


def gateway_options(
    options: TorchServeOptions,
    flags: Mapping[str, object] | None = None,
    *,
    defaults: Mapping[str, object] | None = None,
) -> GatewayOptions:
    """Options of a gateway in front of the TorchServe that `options` start.

    Args:
        options: of TorchServe.
        flags: set by flags, by field name.
        defaults: for what neither flags nor variables set.

    Raises:
        SettingsError: a flag or a variable is wrong.
    """
    known = {
        "inference_url": _reachable(url(options.inference_host, options.inference_port)),
        "backend_request_bytes": options.max_request_bytes,
        "backend_timeout_s": options.response_timeout_s + 10,
    }
    return GatewayOptions.build(flags, defaults=defaults, fixed=known, flag_prefix="--gateway-")


class Service:
    """One TorchServe with one gateway in front; a context manager.

    Args:
        options: of TorchServe; `models` are what should be served.
        gateway: of the gateway, from `gateway_options`; None runs TorchServe alone.
        lenient: if an archive is rejected, serve the others instead of ending.
        report: called with each stage of the start.
    """

    def __init__(
        self,
        options: TorchServeOptions,
        gateway: GatewayOptions | None,
        *,
        lenient: bool = False,
        report: Callable[[str], None] = lambda stage: None,
    ) -> None:
        self._options = options
        self._report = report
        self._gateway_options = gateway
        self._lenient = lenient
        self._listener: socket.socket | None = None
        self._gateway: subprocess.Popen[str] | None = None
        self.torchserve = TorchServe(options)
        self.gateway_url: str | None = None
        self.rejected: list[Rejected] = []

    @property
    def page_url(self) -> str | None:
        """Address of the page; None without a gateway, or if it serves none."""
        has_page = self._gateway_options is not None and self._gateway_options.ui
        return f"{self.gateway_url}/" if has_page and self.gateway_url is not None else None

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Return once frames are answered.

        Raises:
            BackendStartError: TorchServe or the gateway did not come up, or no model could be served.
            ArchiveError: an archive is rejected, and `lenient` is not set.
            SettingsError: the gateway's address is taken, or one of its options cannot be honoured.
        """
        try:
            if self._gateway_options is not None:
                self._listener = bind(
                    self._gateway_options.host,
                    self._gateway_options.port,
                    shared=self._gateway_options.gateways > 1,
                )
            self._start_torchserve()
            if self._gateway_options is not None and self._listener is not None:
                self._report("starting the gateway")
                self._start_gateway(self._gateway_options, self._listener)
        except BaseException:
            self.stop()
            raise

    def wait(self) -> int:
        """Wait until either ends; returns the exit code of that one, never 0 unless TorchServe was stopped on purpose.

        A `KeyboardInterrupt` (Ctrl-C, or SIGTERM where `stoppable`) passes through.
        """
        while True:
            code = self.torchserve.wait(_POLL_S)
            if code is not None:
                if code:
                    logger.error("TorchServe ended by itself with code %d", code)
                return _shell_code(code)
            if self._gateway is not None and (code := self._gateway.poll()) is not None:
                logger.error("the gateway ended by itself with code %d", code)
                return _shell_code(code) or 1

    def stop(self) -> int:
        """Drain and end both; returns the gateway's exit code, 0 when everything in flight was answered."""
        code = 0
        if (gateway := self._gateway) is not None:
            self._gateway = None
            options = self._gateway_options
            assert options is not None
            code = _shell_code(_end(gateway, options.shutdown_delay_s + options.graceful_timeout_s))
        self.torchserve.stop()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        return code

    # Inside

    def _start_torchserve(self) -> None:
        models = list(self._options.models)
        self._report(f"checking the hashes of {len(models)} archive{'s' * (len(models) != 1)}")
        good, self.rejected = examine(self._options.model_store, models)
        for rejected in self.rejected:
            if not self._lenient:
                raise ArchiveError(f"{self._options.model_store / rejected.archive}: {rejected.reason}")
        while good:
            for rejected in self.rejected:
                logger.error("%s is rejected: %s", rejected.archive, rejected.reason)
            self.torchserve = TorchServe(replace(self._options, models=tuple(good)), self._report)
            try:
                self.torchserve.start()
                return
            except ModelNotLoaded as error:
                culprit = next((model for model in good if error.archive == model.archive), None)
                if not self._lenient or culprit is None:
                    raise
                # TorchServe would try to load it for ever; without it the others are served.
                good.remove(culprit)
                self.rejected.append(Rejected(culprit.archive, str(error)))
        reasons = "; ".join(f"{rejected.archive}: {rejected.reason}" for rejected in self.rejected)
        raise BackendStartError(f"no model of {self._options.model_store} can be served: {reasons}")

    def _start_gateway(self, options: GatewayOptions, listener: socket.socket) -> None:
        run_dir = self.torchserve.run_dir
        options = replace(options, management_url=_reachable(self.torchserve.management_url))
        if options.worker_sockets == "auto":
            options = replace(options, worker_sockets=self.torchserve.worker_sockets)
        if self._options.has_tokens and run_dir is not None:
            options = replace(options, backend_key_file=run_dir / KEY_FILE)
        document = {
            "listener": listener.fileno(),
            "options": options.dump(),
            "rejected": {rejected.archive: rejected.reason for rejected in self.rejected},
        }
        self._gateway = gateway = subprocess.Popen(
            [sys.executable, "-m", "serve.cli.gateway"],
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[listener.fileno()],
            # The supervisor passes Ctrl-C on, once; the gateway must not outlive it.
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        listener.close()  # The child has it; a copy here would keep the port open after the child stops listening.
        assert gateway.stdin is not None and gateway.stdout is not None
        with gateway.stdout:
            with contextlib.suppress(BrokenPipeError), gateway.stdin:
                json.dump(document, gateway.stdin)
            deadline = time.monotonic() + _GATEWAY_START_S
            while not select.select([gateway.stdout], [], [], 0)[0]:
                if time.monotonic() > deadline:
                    raise BackendStartError(f"the gateway did not listen within {_GATEWAY_START_S:g} s")
                self.torchserve.wait(0.05)
            self.gateway_url = gateway.stdout.readline().strip() or None
        if self.gateway_url is None:
            code = _shell_code(gateway.wait())
            if code == 2:
                raise SettingsError("the gateway rejected its options (see above)")
            raise BackendStartError(f"the gateway ended with code {code} while starting (see above)")


def _shell_code(code: int) -> int:
    """Convert an exit code of `Popen` to that of a shell: 128 + the signal for a negative one."""
    return 128 - code if code < 0 else code


def _reachable(url: str) -> str:
    """Convert an address to listen on to one to connect to."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _end(process: subprocess.Popen[str], drain_s: float) -> int:
    """SIGTERM, the time to drain, then SIGKILL."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(drain_s + _EXIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
