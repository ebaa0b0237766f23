"""All that can be set about the gateway: one frozen object, from the command line, the environment and defaults.

A flag ``--batch-points`` is the field `batch_points` and the variable ``MMDET3D_SERVE_GATEWAY_BATCH_POINTS``; the flag
goes first. Values that contradict each other stop the start with a sentence. Knows nothing about what the
values do.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from serve.errors import SettingsError
from serve.settings import PREFIX

__all__ = ["GatewayOptions", "parser"]

MIB = 1 << 20


def _said(help_text: str, unit: str) -> dict[str, str]:
    return {"help": help_text, "unit": unit}


@dataclass(frozen=True)
class GatewayOptions:
    """Every option with its unit; the help texts are the documentation."""

    host: str = field(default="127.0.0.1", metadata=_said("address to listen on", "IP"))
    port: int = field(default=8000, metadata=_said("port to listen on; 0 picks a free one", "PORT"))
    inference_url: str = field(
        default="http://127.0.0.1:8080", metadata=_said("TorchServe's inference address", "URL")
    )
    management_url: str = field(
        default="http://127.0.0.1:8081", metadata=_said("TorchServe's management address", "URL")
    )
    backend_key_file: Path | None = field(
        default=None, metadata=_said("TorchServe's key_file.json, where it runs in token mode", "FILE")
    )
    worker_sockets: Path | None = field(
        default=None,
        metadata=_said(
            "folder with the sockets of TorchServe's workers: batches go to them directly, and through TorchServe "
            "where that fails; none: all through TorchServe",
            "DIR",
        ),
    )
    refused_file: Path | None = field(
        default=None,
        metadata=_said(
            "JSON file of archives that are not served, with the reason of each, for /models", "FILE"
        ),
    )
    address_file: Path | None = field(
        default=None, metadata=_said("write the address there once it is listened on", "FILE")
    )
    backend_request_bytes: int = field(
        default=64 * MIB, metadata=_said("TorchServe's max_request_size", "BYTES")
    )
    backend_timeout_s: float = field(
        default=130.0, metadata=_said("longest wait for one batch; more than TorchServe's own limit", "S")
    )

    batch_frames: int = field(default=16, metadata=_said("most frames in a batch", "N"))
    batch_points: int = field(
        default=2_000_000, metadata=_said("most points in a batch of clouds, summed", "N")
    )
    batch_pixels: int = field(
        default=64_000_000,
        metadata=_said("most pixels in a batch of images, each counted as the largest", "N"),
    )
    batch_bytes: int = field(default=48 * MIB, metadata=_said("most bytes in a batch", "BYTES"))
    batches_ahead: int = field(
        default=1, metadata=_said("batches sent on per model while all its workers are busy", "N")
    )
    early_s: float = field(
        default=0.002,
        metadata=_said(
            "how long before a worker is expected to be free a batch that is not full is sent on; 0: never",
            "S",
        ),
    )

    max_frame_bytes: int = field(default=32 * MIB, metadata=_said("largest frame", "BYTES"))
    max_body_bytes: int = field(default=64 * MIB, metadata=_said("largest request body", "BYTES"))
    max_frames_per_request: int = field(default=64, metadata=_said("most frames in one request", "N"))
    max_pending_frames: int = field(
        default=256, metadata=_said("frames waiting or running in all; more are answered 429", "N")
    )
    max_pending_bytes: int = field(
        default=512 * MIB, metadata=_said("bytes held for requests in all; more are answered 429", "BYTES")
    )

    timeout_s: float = field(
        default=30.0, metadata=_said("deadline of a request that names none with timeout_ms", "S")
    )
    max_timeout_s: float = field(
        default=300.0, metadata=_said("longest deadline that a request may name", "S")
    )
    receive_timeout_s: float = field(
        default=30.0, metadata=_said("longest time that a body may take to arrive", "S")
    )
    head_timeout_s: float = field(
        default=10.0, metadata=_said("longest time for a connection to bring a request's head", "S")
    )
    keep_alive_s: float = field(default=15.0, metadata=_said("how long an idle connection is kept", "S"))
    connection_requests: int = field(
        default=0,
        metadata=_said(
            "requests after which a connection is closed, so that clients spread anew; 0: never", "N"
        ),
    )
    stall_s: float = field(default=120.0, metadata=_said("a batch that runs longer turns readiness red", "S"))
    linger_s: float = field(
        default=0.0, metadata=_said("after SIGTERM, still answer for so long while readiness says no", "S")
    )
    drain_s: float = field(
        default=25.0, metadata=_said("after that, how long requests in flight may take to finish", "S")
    )

    api_keys_file: Path | None = field(
        default=None, metadata=_said("file with one API key per line; requests then need one", "FILE")
    )
    api_keys: tuple[str, ...] = field(
        default=(), metadata=_said("API keys, comma separated (environment only)", ""), repr=False
    )
    cors_origins: tuple[str, ...] = field(
        default=(), metadata=_said("origins whose pages may call, comma separated", "URL,…")
    )
    uri_prefixes: tuple[str, ...] = field(
        default=(),
        metadata=_said(
            "allow frames by reference below these, comma separated, such as s3://bucket/frames/", "URI,…"
        ),
    )
    uri_timeout_s: float = field(
        default=10.0, metadata=_said("longest time that reading a frame by reference may take", "S")
    )
    uri_private_hosts: bool = field(
        default=False,
        metadata=_said(
            "let web addresses below uri_prefixes lead to private networks (true or false)", "BOOL"
        ),
    )
    require_models: tuple[str, ...] = field(
        default=(), metadata=_said("ready only when these models are, comma separated", "NAME,…")
    )
    log_format: Literal["json", "text"] = field(
        default="json", metadata=_said("log lines as json or text", "FORMAT")
    )
    log_level: Literal["debug", "info", "warning", "error"] = field(
        default="info", metadata=_said("least level that is logged", "LEVEL")
    )
    otlp_endpoint: str | None = field(
        default=None, metadata=_said("send OpenTelemetry traces there (needs the otel extra)", "URL")
    )

    def __post_init__(self) -> None:
        self._check_ranges()
        contradictions = (
            (
                self.batch_bytes + 64 * 1024 > self.backend_request_bytes,
                "batch_bytes must leave 64 KiB of backend_request_bytes for a header",
            ),
            (
                self.max_frame_bytes > self.batch_bytes,
                "max_frame_bytes is over batch_bytes: such a frame fits no batch",
            ),
            (self.max_body_bytes < self.max_frame_bytes, "max_body_bytes is below max_frame_bytes"),
            (
                self.max_pending_bytes < self.max_body_bytes,
                "max_pending_bytes is below max_body_bytes: the largest request could never be admitted",
            ),
            (
                self.max_pending_frames < self.max_frames_per_request,
                "max_pending_frames is below max_frames_per_request: the largest request could never be admitted",
            ),
            (self.timeout_s > self.max_timeout_s, "timeout_s is over max_timeout_s"),
            (
                "*" in self.cors_origins and bool(self.api_keys or self.api_keys_file),
                "cors_origins=* lets every page use a visitor's API key; list the origins",
            ),
        )
        for contradicts, sentence in contradictions:
            if contradicts:
                raise SettingsError(sentence)

    def _check_ranges(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type not in ("int", "float"):
                continue
            least = (
                0
                if each.name
                in ("port", "linger_s", "batches_ahead", "early_s", "connection_requests", "drain_s")
                else 1
                if each.type == "int"
                else 0.001
            )
            if not value >= least:
                raise SettingsError(f"{each.name} must be at least {least}, not {value}")
        if self.port > 65535:
            raise SettingsError(f"port={self.port} is not a port (0 to 65535)")
        for name in ("inference_url", "management_url"):
            if not str(getattr(self, name)).startswith(("http://", "https://")):
                raise SettingsError(
                    f"{name} must start with http:// or https://, not {getattr(self, name)!r}"
                )
        if self.log_format not in ("json", "text"):
            raise SettingsError(f"log_format must be json or text, not {self.log_format!r}")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise SettingsError(f"log_level must be debug, info, warning or error, not {self.log_level!r}")

    def keys(self) -> tuple[str, ...]:
        """All API keys.

        Raises:
            SettingsError: the file cannot be read or holds none.
        """
        if self.api_keys_file is None:
            return self.api_keys
        try:
            lines = [line.strip() for line in self.api_keys_file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"api_keys_file {self.api_keys_file}: {getattr(error, 'strerror', error)}"
            ) from None
        found = tuple(line for line in lines if line and not line.startswith("#"))
        if not found:
            raise SettingsError(f"api_keys_file {self.api_keys_file} holds no key; write one per line")
        return (*self.api_keys, *found)

    def refused(self) -> dict[str, str]:
        """Archives that are not served, with the reason of each.

        Raises:
            SettingsError: the file cannot be read.
        """
        if self.refused_file is None:
            return {}
        try:
            document = json.loads(self.refused_file.read_text())
            return {str(name): str(reason) for name, reason in document.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise SettingsError(f"refused_file {self.refused_file}: {error}") from None

    @classmethod
    def build(cls, flags: Mapping[str, str | None], environment: Mapping[str, str]) -> GatewayOptions:
        """From texts by field name: flags first, then the environment, then defaults.

        Raises:
            SettingsError: an unknown name, an impossible value, or values that contradict each other.
        """
        known = {each.name: each for each in fields(cls)}
        for name in environment:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {_variable(close[0])}?" if close else ""
                raise SettingsError(f"unknown setting {_variable(name)}{hint}")
        values: dict[str, Any] = {}
        for name, each in known.items():
            text = flags.get(name)
            spelling = f"--{name.replace('_', '-')}"
            if text is None:
                text, spelling = environment.get(name), _variable(name)
            if text is not None:
                values[name] = _parse(each, text, spelling)
        return cls(**values)


def parser(description: str, defaults: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """A command line with a flag per option; values stay texts for `GatewayOptions.build`."""
    made = argparse.ArgumentParser(description=description)
    add_flags(made, leave_out=("api_keys",), defaults=defaults or {})
    return made


def add_flags(
    to: argparse.ArgumentParser, leave_out: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> None:
    """Add a flag per option to a command line, except those to `leave_out`."""
    for each in fields(GatewayOptions):
        if each.name in leave_out:
            continue
        shown = (defaults or {}).get(each.name, each.default)
        said = "none" if shown in (None, ()) else shown
        to.add_argument(
            f"--{each.name.replace('_', '-')}",
            dest=each.name,
            metavar=each.metadata["unit"] or None,
            help=f"{each.metadata['help']} (default: {said})",
        )


def _variable(name: str) -> str:
    return f"{PREFIX}GATEWAY_{name.upper()}"


def _parse(each: Field[Any], text: str, spelling: str) -> Any:
    try:
        if each.type == "int":
            return int(text)
        if each.type == "float":
            return float(text)
    except ValueError:
        raise SettingsError(f"{spelling}={text!r} must be a number ({each.metadata['unit']})") from None
    if each.type == "bool":
        if text.lower() not in ("true", "false", "1", "0"):
            raise SettingsError(f"{spelling}={text!r} must be true or false")
        return text.lower() in ("true", "1")
    if str(each.type).startswith("Path"):
        return None if text == "none" else Path(text)
    if str(each.type).startswith("tuple"):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    assert each.default is not MISSING
    return text
