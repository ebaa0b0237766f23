"""What TorchServe is told: options of ours to its ``config.properties`` and ``log4j2.xml``.

Knows TorchServe 0.12.0's setting names and their traps; starts nothing and asks nothing of the network.
What each setting was seen to do is in ``docs/decisions/0002-torchserve-as-a-child-process.md``.
"""

from __future__ import annotations

import ipaddress
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serve.errors import ArchiveError, SettingsError

__all__ = [
    "Manifest",
    "ServedModel",
    "TorchServeOptions",
    "log_configuration",
    "properties",
    "read_manifest",
    "url",
]

LogLevel = Literal["error", "warn", "info", "debug"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ARCHIVE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,250}\.mar")
# A regular expression that no address matches; archives named by file name are not checked against it.
_NO_URL = "(?!)"
_PORTS = ("inference_port", "management_port", "metrics_port")


@dataclass(frozen=True)
class Manifest:
    """What an archive's ``MAR-INF/MANIFEST.json`` says: names TorchServe uses for it."""

    name: str
    version: str
    handler: str


@dataclass(frozen=True)
class ServedModel:
    """One archive to serve.

    Attributes:
        archive: file name in the model store.
        name: name to serve it under; None takes the archive's own.
        workers: Python processes for it.
        batch_size: rows that TorchServe may put together; 1 leaves batching to the gateway.
        max_batch_delay_ms: longest wait for a full batch, milliseconds (0 would mean TorchServe's own 100).
        response_timeout_s: seconds after which TorchServe kills a worker that has not answered; None: as all.
    """

    archive: str
    name: str | None = None
    workers: int = 1
    batch_size: int = 1
    max_batch_delay_ms: int = 1
    response_timeout_s: int | None = None

    def __post_init__(self) -> None:
        if not _ARCHIVE.fullmatch(self.archive):
            raise SettingsError(f"'{self.archive}' is not the file name of an archive, such as second.mar")
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise SettingsError(f"'{self.name}' is not a model name (letters, digits, '.', '_', '-')")
        for field in ("workers", "batch_size", "max_batch_delay_ms"):
            if getattr(self, field) < 1:
                raise SettingsError(f"{field} of {self.archive} must be at least 1")

    @classmethod
    def parse(cls, text: str, workers: int = 1) -> ServedModel:
        """From ``NAME=FILE.mar``, ``FILE.mar`` or ``NAME`` (then the file is ``NAME.mar``)."""
        name, equals, archive = text.partition("=")
        if equals:
            return cls(archive=archive, name=name, workers=workers)
        return cls(archive=text if text.endswith(".mar") else f"{text}.mar", workers=workers)


@dataclass(frozen=True)
class TorchServeOptions:
    """How to run TorchServe.

    Attributes:
        model_store: folder that holds the archives.
        models: what to load at the start.
        inference_host: address that answers predictions.
        inference_port: its port.
        management_host: address that answers management calls; beyond loopback only with `open_management`.
        management_port: its port.
        metrics_host: address that answers metrics.
        metrics_port: its port.
        open_management: allow `management_host` to be reachable from elsewhere.
        model_api: whether models can be registered and removed at run time.
        token_authorization: ask for TorchServe's tokens on inference and management.
        max_request_bytes: largest request body, bytes; a larger one gets 413 with an empty body.
        max_response_bytes: largest answer of a worker, bytes.
        response_timeout_s: seconds after which a worker that has not answered is killed and replaced.
        startup_timeout_s: seconds that all models together may take to get ready.
        job_queue_size: requests that may wait for a model; more get 503 from TorchServe.
        gpus: how many GPUs TorchServe may use; None: all it finds.
        system_metrics: collect the machine's CPU, memory and disk figures (no GPU's) for the metrics port.
        log_level: least level that is echoed; the log file always has ``info``.
        echo_logs: repeat the log on our standard error.
        log_dir: folder for the log files; None: in the run folder, removed when TorchServe stops.
        java_options: further arguments for the Java machine, such as ``-Xmx2g``.
        run_root: folder in which the private run folder is made; None: the system's temporary folder.
        state_dir: folder for the file by which `stop_running` finds this server; None: none is written.
    """

    model_store: Path
    models: Sequence[ServedModel] = ()
    inference_host: str = "127.0.0.1"
    inference_port: int = 8080
    management_host: str = "127.0.0.1"
    management_port: int = 8081
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 8082
    open_management: bool = False
    model_api: bool = True
    token_authorization: bool = False
    max_request_bytes: int = 64 << 20
    max_response_bytes: int = 64 << 20
    response_timeout_s: int = 120
    startup_timeout_s: int = 300
    job_queue_size: int = 100
    gpus: int | None = None
    system_metrics: bool = True
    log_level: LogLevel = "warn"
    echo_logs: bool = False
    log_dir: Path | None = None
    java_options: Sequence[str] = ()
    run_root: Path | None = None
    state_dir: Path | None = None

    def __post_init__(self) -> None:
        ports = [getattr(self, name) for name in _PORTS]
        for name, port in zip(_PORTS, ports, strict=True):
            if not 1 <= port <= 65535:
                raise SettingsError(f"{name}={port} is not a port (1 to 65535)")
        if len(set(ports)) != len(ports):
            raise SettingsError(f"{', '.join(_PORTS)} must differ; they are {', '.join(map(str, ports))}")
        for host in (self.inference_host, self.management_host, self.metrics_host):
            _check_host(host)
        if not ipaddress.ip_address(self.management_host).is_loopback and not self.open_management:
            raise SettingsError(
                f"management_host={self.management_host} lets others load and remove models; "
                "set open_management to allow that, or keep it on 127.0.0.1"
            )
        for name in ("max_request_bytes", "max_response_bytes"):
            if not 1024 <= getattr(self, name) < 1 << 31:
                raise SettingsError(
                    f"{name}={getattr(self, name)} must be from 1024 to {(1 << 31) - 1} bytes"
                )
        for name in ("response_timeout_s", "startup_timeout_s", "job_queue_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)} must be at least 1")


def _check_host(host: str) -> None:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise SettingsError(f"'{host}' is not an IP address to listen on, such as 127.0.0.1") from None


def url(host: str, port: int) -> str:
    """Address for TorchServe's ``*_address`` settings and for clients (IPv6 in brackets)."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def read_manifest(path: Path) -> Manifest:
    """Read what TorchServe will go by; it would itself take any file for an archive without a handler.

    Raises:
        ArchiveError: the file is missing, not a zip, or its manifest does not name a model and a handler.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            model = json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]
            manifest = Manifest(
                name=str(model["modelName"]),
                version=str(model["modelVersion"]),
                handler=str(model["handler"]),
            )
    except FileNotFoundError:
        raise ArchiveError(
            f"there is no archive {path.name} in {path.parent}; make it with `make archive`"
        ) from None
    except (zipfile.BadZipFile, OSError) as error:
        raise ArchiveError(
            f"{path.name} is not a readable archive ({error}); copy or convert it again"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ArchiveError(
            f"{path.name} has no usable MAR-INF/MANIFEST.json ({error}); convert it again"
        ) from None
    if not _NAME.fullmatch(manifest.name):
        raise ArchiveError(
            f"{path.name} names its model '{manifest.name}', which cannot be part of an address"
        )
    return manifest


def properties(options: TorchServeOptions, manifests: Sequence[Manifest]) -> str:
    """Text of ``config.properties``; `manifests` are those of ``options.models``, in order."""
    settings: dict[str, object] = {
        "inference_address": url(options.inference_host, options.inference_port),
        "management_address": url(options.management_host, options.management_port),
        "metrics_address": url(options.metrics_host, options.metrics_port),
        # Always served, never used by us; port 0 lets the system pick, so that two servers do not collide.
        "grpc_inference_address": "127.0.0.1",
        "grpc_management_address": "127.0.0.1",
        "grpc_inference_port": 0,
        "grpc_management_port": 0,
        "model_store": options.model_store.resolve(),
        "allowed_urls": _NO_URL,
        "use_env_allowed_urls": False,
        "enable_envvars_config": False,
        "install_py_dep_per_model": False,
        "enable_model_api": options.model_api,
        "disable_token_authorization": not options.token_authorization,
        "metrics_mode": "prometheus",
        "model_metrics_auto_detect": True,
        "disable_system_metrics": not options.system_metrics,
        # Its own command wants the package nvgpu where there are GPUs, and collects nothing without it.
        "system_metrics_cmd": "ts/metrics/metric_collector.py --gpu 0",
        "max_request_size": options.max_request_bytes,
        "max_response_size": options.max_response_bytes,
        # A broken JSON body is then the handler's to answer.
        "decode_input_request": False,
        "default_response_timeout": options.response_timeout_s,
        "default_startup_timeout": options.startup_timeout_s,
        "default_workers_per_model": 1,
        "job_queue_size": options.job_queue_size,
        "prefer_direct_buffer": False,
    }
    if options.gpus is not None:
        settings["number_of_gpu"] = options.gpus
    if options.models:
        names = [
            model.name or manifest.name for model, manifest in zip(options.models, manifests, strict=True)
        ]
        settings["load_models"] = ",".join(
            f"{name}={model.archive}" for name, model in zip(names, options.models, strict=True)
        )
        settings["models"] = json.dumps(_model_settings(options, names, manifests))
    return "".join(f"{key}={_escaped(value)}\n" for key, value in settings.items())


def _model_settings(
    options: TorchServeOptions, names: Sequence[str], manifests: Sequence[Manifest]
) -> dict[str, dict[str, dict[str, object]]]:
    table: dict[str, dict[str, dict[str, object]]] = {}
    for name, model, manifest in zip(names, options.models, manifests, strict=True):
        versions = table.setdefault(name, {})
        if manifest.version in versions:
            raise SettingsError(
                f"model {name} version {manifest.version} is listed twice; give one another name"
            )
        versions[manifest.version] = {
            "defaultVersion": not versions,
            "marName": model.archive,
            "minWorkers": model.workers,
            "maxWorkers": model.workers,
            "batchSize": model.batch_size,
            "maxBatchDelay": model.max_batch_delay_ms,
            "responseTimeout": model.response_timeout_s or options.response_timeout_s,
            "startupTimeout": options.startup_timeout_s,
        }
    return table


def _escaped(value: object) -> str:
    """A value as Java's Properties reads it: Latin-1 with backslash escapes."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if "\n" in text or "\r" in text:
        raise SettingsError(f"a setting of TorchServe cannot hold a line break: {text!r}")
    text = text.replace("\\", "\\\\")
    units = text.encode("utf-16-be")
    pairs = (int.from_bytes(units[i : i + 2], "big") for i in range(0, len(units), 2))
    return "".join(chr(unit) if 0x20 <= unit < 0x7F else f"\\u{unit:04x}" for unit in pairs)


def log_configuration(options: TorchServeOptions, log_file: Path) -> str:
    """Text of ``log4j2.xml``: one bounded file at level info, and our standard error where asked for.

    What TorchServe logs several times per request (at info) is left out.
    """
    echo = f'<AppenderRef ref="echo" level="{options.log_level}"/>' if options.echo_logs else ""
    root = "debug" if echo and options.log_level == "debug" else "info"
    pattern = '<PatternLayout pattern="%d{ISO8601} %p [%t] %c{1}: %m%n"/>'
    file = str(log_file).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    noise = (
        r"(Flushing req.cmd PREDICT|Looping backend response|Backend response time|Backend received inference"
        r"|result=\[METRICS\]|Sending response for jobId).*"
    )
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="error">
  <Appenders>
    <RollingFile name="file" fileName="{file}" filePattern="{file}.%i" append="true">
      {pattern}
      <Policies><SizeBasedTriggeringPolicy size="20 MB"/></Policies>
      <DefaultRolloverStrategy max="2"/>
      <RegexFilter regex="{noise}" onMatch="DENY" onMismatch="NEUTRAL"/>
    </RollingFile>
    <Console name="echo" target="SYSTEM_OUT">
      {pattern}
      <RegexFilter regex="{noise}" onMatch="DENY" onMismatch="NEUTRAL"/>
    </Console>
  </Appenders>
  <Loggers>
    <Logger name="ACCESS_LOG" level="off"/>
    <Logger name="MODEL_METRICS" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <Logger name="io.netty" level="error"/>
    <Logger name="org.apache" level="off"/>
    <Root level="{root}"><AppenderRef ref="file" level="info"/>{echo}</Root>
  </Loggers>
</Configuration>
"""
