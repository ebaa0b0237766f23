"""Environment to one frozen object. The only reader of the environment.

Every setting is ``MMDET3D_SERVE_<NAME>``; an unknown or impossible one stops the start with a sentence
that says what to change. Knows nothing about who uses the values.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from serve.errors import SettingsError

__all__ = ["PREFIX", "Limits", "Preference", "Settings"]

PREFIX = "MMDET3D_SERVE_"
Preference = Literal["auto", "portable"]
_SERVICE_LINK = re.compile(
    r"(\w+_)?(service_host|service_port(_\w+)?|port_\d+_(tcp|udp|sctp)(_(proto|port|addr))?)"
)


@dataclass(frozen=True)
class Limits:
    """Upper bounds on one frame, checked before memory is taken."""

    max_frame_bytes: int = 64 << 20
    max_points: int = 2_000_000
    max_pixels: int = 50_000_000


@dataclass(frozen=True)
class Settings:
    """Settings of this process.

    Attributes:
        ops: ``auto`` takes a compiled mmcv where one is installed, ``portable`` always our kernels.
        trust_archive_code: import modules packed in an archive.
        max_frame_bytes: largest frame, bytes.
        max_points: largest cloud, points.
        max_pixels: largest image, pixels.
        threads: torch threads of one worker; 0 takes all cores, or as many as the container's CPU quota pays for.
        cache_dir: where downloads are kept.
        open_management: let a container's management port be reached from outside, with tokens.
        workers: Python processes per model in a container.
        gateway: texts of ``MMDET3D_SERVE_GATEWAY_*`` by lower-case name; `serve.gateway.options` reads them.
        keep_memory: on a CPU, keep freed memory for the next frame (`serve.runtime.malloc`); off where the environment
            tunes malloc itself, unless asked for.
        cache_max_bytes: bound on copies of remote objects there, bytes; files with a hash in their name stay.
        worker_sockets: folder in which a worker of TorchServe listens for batches that come directly; set by what
            starts TorchServe (`serve.torchserve`).
    """

    ops: Preference = "auto"
    trust_archive_code: bool = False
    max_frame_bytes: int = Limits.max_frame_bytes
    max_points: int = Limits.max_points
    max_pixels: int = Limits.max_pixels
    threads: int = 0
    cache_dir: Path = Path("~/.cache/mmdet3d-serve")
    open_management: bool = False
    workers: int = 1
    gateway: Mapping[str, str] = field(default_factory=dict, repr=False)
    cache_max_bytes: int = 20_000_000_000
    keep_memory: bool = True
    worker_sockets: Path | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read all ``MMDET3D_SERVE_*`` variables.

        Raises:
            SettingsError: unknown name or impossible value.
        """
        known = {f.name for f in fields(cls)} - {"gateway"}
        values: dict[str, Any] = {}
        gateway: dict[str, str] = {}
        for variable, text in environ.items():
            if not variable.startswith(PREFIX):
                continue
            name = variable[len(PREFIX) :].lower()
            if _is_service_link(name, text):
                continue
            if name.startswith("gateway_"):
                gateway[name.removeprefix("gateway_")] = text
                continue
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = (
                    f"; did you mean {PREFIX}{close[0].upper()}?"
                    if close
                    else f"; known: {', '.join(sorted(known))}"
                )
                raise SettingsError(f"unknown setting {variable}{hint}")
            try:
                values[name] = _PARSERS[name](text)
            except ValueError as error:
                raise SettingsError(f"{variable}={text!r}: {error}") from None
        values.setdefault("keep_memory", not _malloc_is_tuned(environ))
        return cls(**values, gateway=gateway)

    @property
    def limits(self) -> Limits:
        """The bounds on one frame."""
        return Limits(self.max_frame_bytes, self.max_points, self.max_pixels)


def _is_service_link(name: str, text: str) -> bool:
    """Whether Kubernetes put it there for a Service called mmdet3d-serve or mmdet3d-serve-something.

    Every pod of a namespace gets such variables unless it says ``enableServiceLinks: false``.
    """
    if _SERVICE_LINK.fullmatch(name):
        return True
    # Ours, gateway_port, is a number; Kubernetes' is tcp://10.0.0.1:8000.
    return name.endswith("port") and "://" in text


def _malloc_is_tuned(environ: Mapping[str, str]) -> bool:
    """Whether somebody chose an allocator, or settings for glibc's."""
    preloaded = environ.get("LD_PRELOAD", "")
    return (
        any(name.startswith("MALLOC_") for name in environ)
        or "glibc.malloc" in environ.get("GLIBC_TUNABLES", "")
        or any(name in preloaded for name in ("jemalloc", "tcmalloc", "mimalloc"))
    )


def _preference(text: str) -> Preference:
    if text == "auto":
        return "auto"
    if text == "portable":
        return "portable"
    raise ValueError("must be auto or portable")


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("must be 1 or 0")


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise ValueError(f"must be a whole number of {least} or more")
        return int(text)

    return parse


_PARSERS: dict[str, Callable[[str], Any]] = {
    "ops": _preference,
    "trust_archive_code": _flag,
    "max_frame_bytes": _count(1),
    "max_points": _count(1),
    "max_pixels": _count(1),
    "threads": _count(0),
    "open_management": _flag,
    "workers": _count(1),
    "cache_dir": Path,
    "cache_max_bytes": _count(0),
    "keep_memory": _flag,
    "worker_sockets": Path,
}
