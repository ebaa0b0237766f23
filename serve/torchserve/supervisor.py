"""TorchServe and the gateway as one service: start, watch, drain, end.

TorchServe starts first, with every archive that can be served; then the gateway, which reports those that were
refused. The end of either ends the other. Stopping drains: the gateway stops admitting and answers what is in
flight, and only then TorchServe, which would drop it, is told. Used by ``make serve``, ``make demo`` and the
image alike. Knows nothing about requests.
"""

from __future__ import annotations

import ctypes
import json
import logging
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from serve import archive
from serve.errors import ArchiveError, BackendStartError, ModelNotLoaded, SettingsError
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from serve.torchserve.java import child_environment

__all__ = ["Refused", "Service", "archives_of", "examine"]

_POLL_S = 0.25
_PR_SET_PDEATHSIG = 1
# What the gateway may need beyond its own limits to end: the interpreter's own way out.
_EXIT_S = 5.0
_GATEWAY_START_S = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refused:
    """An archive that is not served, and why."""

    archive: str
    reason: str


def archives_of(store: Path, workers: int) -> list[ServedModel]:
    """Every archive of a store, by file name.

    Raises:
        SettingsError: there is none.
    """
    found = sorted(path.name for path in store.glob("*.mar"))
    if not found:
        raise SettingsError(f"{store} holds no archive; make one with `make archive MODEL=second`")
    return [ServedModel(name, workers=workers) for name in found]


def examine(store: Path, models: Sequence[ServedModel]) -> tuple[list[ServedModel], list[Refused]]:
    """Check every hash of every archive: those that can be served, and those that are refused."""
    good: list[ServedModel] = []
    refused: list[Refused] = []
    for model in models:
        try:
            archive.verify(store / model.archive)
            good.append(model)
        except ArchiveError as error:
            refused.append(Refused(model.archive, str(error)))
    return good, refused


class Service:
    """One TorchServe with one gateway in front; a context manager.

    Args:
        options: of TorchServe; `models` are what should be served.
        gateway: options of the gateway by field name, as texts, beyond those that say where TorchServe is; None
            runs TorchServe alone.
        lenient: serve the rest where a model is refused, instead of ending.
    """

    def __init__(
        self, options: TorchServeOptions, gateway: Mapping[str, str] | None, *, lenient: bool = False
    ) -> None:
        self._options = options
        self._flags = gateway
        self._lenient = lenient
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._gateway: subprocess.Popen[str] | None = None
        self.torchserve = TorchServe(options)
        self.gateway_url: str | None = None
        self.refused: list[Refused] = []

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
            ArchiveError: an archive is refused, and `lenient` is not set.
            SettingsError: the gateway refused its options.
        """
        try:
            self._start_torchserve()
            if self._flags is not None:
                self._start_gateway(self._flags)
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
            code = _shell_code(_end(gateway, self._drain_s()))
        self.torchserve.stop()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        return code

    # Inside

    def _start_torchserve(self) -> None:
        models = list(self._options.models)
        good, self.refused = examine(self._options.model_store, models)
        for refused in self.refused:
            if not self._lenient:
                raise ArchiveError(f"{self._options.model_store / refused.archive}: {refused.reason}")
        while good:
            for refused in self.refused:
                logger.error("%s is refused: %s", refused.archive, refused.reason)
            self.torchserve = TorchServe(replace(self._options, models=tuple(good)))
            try:
                self.torchserve.start()
                return
            except ModelNotLoaded as error:
                culprit = next((model for model in good if error.archive == model.archive), None)
                if not self._lenient or culprit is None:
                    raise
                # TorchServe would try to load it for ever; without it the others are served.
                good.remove(culprit)
                self.refused.append(Refused(culprit.archive, str(error)))
        reasons = "; ".join(f"{refused.archive}: {refused.reason}" for refused in self.refused)
        raise BackendStartError(f"no model of {self._options.model_store} can be served: {reasons}")

    def _start_gateway(self, flags: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mmdet3d-serve-", dir=self._options.run_root)
        said = {
            "inference_url": _reachable(self.torchserve.inference_url),
            "management_url": _reachable(self.torchserve.management_url),
            "backend_request_bytes": str(self._options.max_request_bytes),
            "backend_timeout_s": str(self._options.response_timeout_s + 10),
            **flags,
        }
        if "worker_sockets" not in self._environment():  # which a flag of ours would go before
            said.setdefault("worker_sockets", str(self.torchserve.worker_sockets))
        if self.refused:
            listed = Path(self._folder.name, "refused.json")
            listed.write_text(json.dumps({refused.archive: refused.reason for refused in self.refused}))
            said["refused_file"] = str(listed)
        if self._options.token_authorization and self.torchserve.run_dir is not None:
            said["backend_key_file"] = str(self.torchserve.run_dir / "key_file.json")
        address = Path(self._folder.name, "address")
        said["address_file"] = str(address)
        words = [word for name, value in said.items() for word in (f"--{name.replace('_', '-')}", value)]
        self._gateway = subprocess.Popen(
            [sys.executable, "-m", "serve", "gateway", *words],
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            text=True,
            # Ctrl-C is ours to pass on, once; and it must not outlive us.
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        deadline = time.monotonic() + _GATEWAY_START_S
        while not address.exists():
            if (code := self._gateway.poll()) is not None:
                if code == 2:
                    raise SettingsError("the gateway refused its options; it said why above")
                raise BackendStartError(
                    f"the gateway ended with code {code} while starting; it said why above"
                )
            if time.monotonic() > deadline:
                raise BackendStartError(f"the gateway did not listen within {_GATEWAY_START_S:g} s")
            self.torchserve.wait(0.05)
        self.gateway_url = address.read_text().strip()

    def _drain_s(self) -> float:
        """What the gateway may take: as it was told, or as it says by itself."""
        from serve.gateway.options import GatewayOptions

        options = GatewayOptions.build(self._flags or {}, self._environment())
        return options.linger_s + options.drain_s

    def _environment(self) -> Mapping[str, str]:
        """What the environment says about the gateway."""
        from serve.settings import Settings

        return Settings.from_environment().gateway


def _shell_code(code: int) -> int:
    """An exit code as shells have it: 128 + the signal, where `Popen` has the signal's negative."""
    return 128 - code if code < 0 else code


def _reachable(url: str) -> str:
    """An address to connect to, of one to listen on."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _end(process: subprocess.Popen[str], drain_s: float) -> int:
    """SIGTERM, the time to drain, then SIGKILL."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(drain_s + _EXIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _die_with_parent() -> None:
    """In the child before exec: have the kernel end it when its parent dies, however that dies (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
