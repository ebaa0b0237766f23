"""Options of TorchServe, and the ``config.properties`` and ``log4j2.xml`` made of them.

Knows TorchServe 0.12.0's setting names and their traps; starts nothing and asks nothing of the network.
What each setting was seen to do is in ``docs/decisions/0002-torchserve-as-a-child-process.md``.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass as options_class

from serve.archive.bounds import MANIFEST, check_plain_name, unique_members
from serve.archive.zip_layout import open_zip
from serve.errors import ArchiveError, SettingsError
from serve.settings import CONFIG, Flag, OptionalCount, OptionalPath, Options, option

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
_MAX_RESPONSE_BYTES = 64 << 20
# Requests that may wait for a model; TorchServe answers more of them 503.
_JOB_QUEUE_SIZE = 100
_PORTS = ("inference_port", "management_port", "metrics_port")


@dataclass(frozen=True)
class Manifest:
    """Names that TorchServe takes from an archive's ``MAR-INF/MANIFEST.json``."""

    name: str
    version: str
    handler: str


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _check_archive(name: str) -> str:
    if not _ARCHIVE.fullmatch(name):
        raise ValueError("must be the file name of an archive, such as second.mar")
    return name


def _check_name(name: str | None) -> str | None:
    if name is not None and not _NAME.fullmatch(name):
        raise ValueError("must be a model name (letters, digits, '.', '_', '-')")
    return name


def _check_address(host: str) -> str:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ValueError("must be an IP address to listen on, such as 127.0.0.1") from None
    return host


Address = Annotated[str, AfterValidator(_check_address)]


@options_class(frozen=True, config=CONFIG)
class ServedModel(Options):
    """One archive to serve.

    Attributes:
        archive: file name in the model store.
        name: name to serve it under; None takes the archive's own.
        workers: Python processes for it.
        response_timeout_s: seconds after which TorchServe kills a worker that has not answered; None: as all.
    """

    archive: Annotated[str, AfterValidator(_check_archive)]
    name: Annotated[str | None, AfterValidator(_check_name)] = None
    workers: int = Field(default=1, ge=1)
    response_timeout_s: int | None = Field(default=None, ge=1)

    @classmethod
    def parse(cls, text: str, workers: int = 1) -> ServedModel:
        """Read ``NAME=FILE.mar``, ``FILE.mar`` or ``NAME`` (then the file is ``NAME.mar``), as ``--models`` takes it.

        Raises:
            SettingsError: it is none of these.
        """
        name, equals, archive = text.rpartition("=")
        archive = archive if equals or archive.endswith(".mar") else f"{archive}.mar"
        try:
            _check_archive(archive)
            _check_name(name if equals else None)
        except ValueError:
            raise SettingsError(
                "--models must be NAME, FILE.mar or NAME=FILE.mar of letters, digits, '.', '_' and '-', "
                f"got {text!r}"
            ) from None
        return cls(archive=archive, name=name if equals else None, workers=workers)


def _host(default: str, use: str) -> Any:
    return option(default, "IP", f"address for {use}")


def _port(default: int, use: str) -> Any:
    return option(default, "PORT", f"port for {use}", common=True, ge=1, le=65535)


@options_class(frozen=True, config=CONFIG)
class TorchServeOptions(Options):
    """How to run TorchServe: flags of ``mmdet3d-serve serve``; none of them is an environment variable.

    Attributes:
        model_store: folder that holds the archives.
        models: what to load at the start.
        open_management: whether `management_host` may lie beyond loopback, as in `Settings`.
    """

    SCOPE: ClassVar[str] = "torchserve_"
    HAS_VARIABLES: ClassVar[bool] = False

    model_store: Path
    models: Sequence[ServedModel] = ()
    open_management: bool = False
    inference_host: Address = _host("127.0.0.1", "TorchServe's predictions")
    inference_port: int = _port(8080, "TorchServe's predictions")
    management_host: Address = _host(
        "127.0.0.1", "management, where it has a port; beyond loopback only with open_management"
    )
    management_port: int = _port(
        8081, "management with token_authorization or open_management; without, it has no port"
    )
    metrics_host: Address = _host("127.0.0.1", "TorchServe's metrics")
    metrics_port: int = _port(8082, "TorchServe's metrics")
    model_api: Flag = option(True, "", "allow loading and removing models at run time")
    token_authorization: Flag = option(
        False,
        "",
        "give management a port, and ask for TorchServe's tokens on it and on inference; without, management is a "
        "socket in the run folder that this user alone can open",
    )
    max_request_bytes: int = option(
        64 << 20, "BYTES", "largest request body; a larger one gets 413", common=True, ge=1024, lt=1 << 31
    )
    response_timeout_s: int = option(
        120, "S", "time after which a worker that has not answered is replaced", common=True, ge=1
    )
    startup_timeout_s: int = option(300, "S", "time that loading all models may take", common=True, ge=1)
    gpus: OptionalCount = option(None, "N", "GPUs to use at most; none: all", common=True, ge=0)
    system_metrics: Flag = option(
        True, "", "collect the machine's CPU, memory and disk figures for the metrics port"
    )
    log_level: LogLevel | None = option(
        None, "", "repeat TorchServe's log from this level on standard error", common=True
    )
    log_dir: OptionalPath = option(
        None, "DIR", "keep log files in this folder; none: they are removed when TorchServe stops"
    )
    java_options: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = option(
        (), "OPTION", "argument for the Java machine, as --java-options=-Xmx2g; may be repeated"
    )
    run_root: OptionalPath = option(
        None, "DIR", "folder in which the private run folder is made; none: the system's temporary folder"
    )
    state_dir: OptionalPath = option(
        None,
        "DIR",
        "folder for the file by which `mmdet3d-serve stop` finds this server; none: no file",
        common=True,
    )

    @property
    def has_tokens(self) -> bool:
        """Whether TorchServe asks for tokens; management has a port only then, because any local user reaches one."""
        return self.token_authorization or self.open_management

    def contradictions(self, spelling: Mapping[str, str]) -> Iterator[str]:
        """Yield a message for every pair of values that exclude each other.

        Args:
            spelling: name of each field as messages show it.
        """
        ports = [getattr(self, name) for name in _PORTS]
        if len(set(ports)) != len(ports):
            shown = (f"{spelling[name]}={port}" for name, port in zip(_PORTS, ports, strict=True))
            yield f"ports must differ, got {', '.join(shown)}"
        if not ipaddress.ip_address(self.management_host).is_loopback and not self.open_management:
            yield (
                f"{spelling['management_host']}={self.management_host} lets others load and remove models; set "
                "open_management to allow that (--open-management, MMDET3D_SERVE_OPEN_MANAGEMENT=1), or keep it on "
                "127.0.0.1"
            )


def url(host: str, port: int) -> str:
    """Address for TorchServe's ``*_address`` settings and for clients (IPv6 in brackets)."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def read_manifest(path: Path) -> Manifest:
    """Read what TorchServe will go by; it would itself take any file for an archive without a handler.

    TorchServe unpacks what it registers without bounds, by the headers inside the zip, so layout, names and sizes are
    checked here as well (`serve.archive.zip_layout`).

    Raises:
        ArchiveError: the file is missing, not a plain zip, or its manifest does not name a model and a handler.
    """
    if not path.exists():
        raise ArchiveError(f"there is no archive {path.name} in {path.parent}; make it with `make archive`")
    try:
        with open_zip(path, check_plain_name) as archive:
            document = archive.read(MANIFEST)
        model = json.loads(document, object_pairs_hook=unique_members)["model"]
        manifest = Manifest(
            name=str(model["modelName"]), version=str(model["modelVersion"]), handler=str(model["handler"])
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArchiveError(
            f"{path.name} has no usable MAR-INF/MANIFEST.json ({error}); convert it again"
        ) from None
    if not _NAME.fullmatch(manifest.name):
        raise ArchiveError(
            f"{path.name} names its model '{manifest.name}', which cannot be part of an address"
        )
    return manifest


def properties(
    options: TorchServeOptions, manifests: Sequence[Manifest], management: str | None = None
) -> str:
    """Text of ``config.properties``.

    Args:
        options: options of TorchServe.
        manifests: those of ``options.models``, in order.
        management: address of management; None: that in `options`.
    """
    settings: dict[str, object] = {
        "inference_address": url(options.inference_host, options.inference_port),
        "management_address": management or url(options.management_host, options.management_port),
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
        "disable_token_authorization": not options.has_tokens,
        "metrics_mode": "prometheus",
        "model_metrics_auto_detect": True,
        "disable_system_metrics": not options.system_metrics,
        # Its own command wants the package nvgpu where there are GPUs, and collects nothing without it.
        "system_metrics_cmd": "ts/metrics/metric_collector.py --gpu 0",
        "max_request_size": options.max_request_bytes,
        "max_response_size": _MAX_RESPONSE_BYTES,
        # A broken JSON body is then the handler's to answer.
        "decode_input_request": False,
        "default_response_timeout": options.response_timeout_s,
        "default_startup_timeout": options.startup_timeout_s,
        "default_workers_per_model": 1,
        "job_queue_size": _JOB_QUEUE_SIZE,
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
            # The gateway makes the batches; a delay of 0 would mean TorchServe's own 100 ms.
            "batchSize": 1,
            "maxBatchDelay": 1,
            "responseTimeout": model.response_timeout_s or options.response_timeout_s,
            "startupTimeout": options.startup_timeout_s,
        }
    return table


def _escaped(value: object) -> str:
    """Encode a value for Java's Properties: Latin-1 with backslash escapes."""
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
    echo = f'<AppenderRef ref="echo" level="{options.log_level}"/>' if options.log_level else ""
    root = "debug" if options.log_level == "debug" else "info"
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
