"""Options of the ML backend for Label Studio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from pydantic.dataclasses import dataclass

from serve.settings import (
    CONFIG,
    MAX_FRAME_BYTES,
    Flag,
    Names,
    OptionalPath,
    OptionalText,
    Options,
    Text,
    option,
)

__all__ = ["LabelStudioOptions"]


@dataclass(frozen=True, config=CONFIG)
class LabelStudioOptions(Options):
    """Options: flags of ``mmdet3d-serve label-studio``, variables ``MMDET3D_SERVE_LABEL_STUDIO_*``."""

    SCOPE: ClassVar[str] = "label_studio_"

    gateway_url: Text = option("http://127.0.0.1:8000", "URL", "address of the gateway", common=True)
    api_key: OptionalText = option(
        None,
        "KEY",
        "API key of the gateway; no flag, because a process list shows flags",
        flag=False,
        repr=False,
    )
    model: OptionalText = option(
        None, "NAME", "name of the served model; it must be one for images", common=True
    )
    version: OptionalText = option(None, "VERSION", "its version; none: the default one")
    score_thr: float = option(0.3, "SCORE", "lowest score of a prediction", common=True, ge=0, le=1)
    host: Text = option("127.0.0.1", "IP", "address to listen on", common=True)
    port: int = option(9090, "PORT", "port to listen on; 0 picks a free one", common=True, ge=0, le=65535)
    basic_auth: OptionalText = option(
        None,
        "USER:PASSWORD",
        "what Label Studio must send (its field for basic authentication); no flag, because a process list shows flags",
        flag=False,
        repr=False,
    )
    label_studio_url: OptionalText = option(
        None, "URL", "Label Studio, from which uploaded images are read, and from nowhere else", common=True
    )
    label_studio_token: OptionalText = option(
        None,
        "TOKEN",
        "access token for them; no flag, because a process list shows flags",
        flag=False,
        repr=False,
    )
    local_files: OptionalPath = option(
        None, "DIR", "folder of the images that tasks name as /data/local-files/?d=…", common=True
    )
    image_prefixes: Names = option(
        (), "URI", "read images below these, such as https://host/images/ or s3://bucket/images/", common=True
    )
    private_hosts: Flag = option(False, "", "let web addresses in image_prefixes lead to private networks")
    image_timeout_s: float = option(10.0, "S", "longest time that reading an image may take", ge=0.001)
    max_image_bytes: int = option(MAX_FRAME_BYTES, "BYTES", "largest image", ge=1)
    max_request_bytes: int = option(64 << 20, "BYTES", "largest request of Label Studio", ge=1024)
    max_pending_bytes: int = option(
        256 << 20,
        "BYTES",
        "most bytes of requests that are held at a time; a request beyond gets 429",
        ge=1024,
    )
    body_timeout_s: float = option(60.0, "S", "longest time in which a request may arrive", ge=0.001)
    max_tasks: int = option(256, "N", "most tasks in a request", ge=1)
    concurrency: int = option(8, "N", "images that are predicted at a time", ge=1)
    timeout_s: float = option(60.0, "S", "deadline of one image", ge=0.001)

    def contradictions(self, spelling: Mapping[str, str]) -> Iterator[str]:
        """Yield a message for every pair of values that exclude each other."""
        if self.basic_auth is not None and ":" not in self.basic_auth:
            yield f"{spelling['basic_auth']} must be USER:PASSWORD"
        if self.max_pending_bytes < self.max_request_bytes:
            yield (
                f"{spelling['max_pending_bytes']} must be at least {spelling['max_request_bytes']}, "
                f"{self.max_request_bytes}"
            )
        if self.label_studio_token is not None and self.label_studio_url is None:
            yield f"{spelling['label_studio_token']} is of no use without {spelling['label_studio_url']}"
