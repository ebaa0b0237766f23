"""Options of the gateway, with their contradictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator
from pydantic.dataclasses import dataclass

from serve.errors import SettingsError
from serve.gateway.rollout import parse_shares
from serve.protocol.batching import BATCH_BYTES, BATCH_PIXELS, BATCH_POINTS
from serve.protocol.json_reader import JsonBounds
from serve.settings import (
    CONFIG,
    MAX_FRAME_BYTES,
    Flag,
    Names,
    OptionalCount,
    OptionalPath,
    OptionalText,
    Options,
    Text,
    option,
    warn_renamed,
)

__all__ = ["GatewayOptions"]

MIB = 1 << 20
# What a batch's header may take of TorchServe's max_request_size.
_HEADER_BYTES = 64 * 1024


def _check_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("must start with http:// or https://")
    return url


def _check_management_url(url: str) -> str:
    return url if url.startswith("unix:/") else _check_url(url)


def _warn_of_none(folder: object) -> object:
    if folder == "none":
        warn_renamed("worker_sockets=none", "direct_batches=false")
    return folder


def _check_canaries(texts: tuple[str, ...]) -> tuple[str, ...]:
    parse_shares(texts, divided=True)
    return texts


def _check_shadows(texts: tuple[str, ...]) -> tuple[str, ...]:
    parse_shares(texts, divided=False)
    return texts


CanaryShares = Annotated[Names, AfterValidator(_check_canaries)]
ShadowShares = Annotated[Names, AfterValidator(_check_shadows)]
Url = Annotated[str, AfterValidator(_check_url)]
ManagementUrl = Annotated[str, AfterValidator(_check_management_url)]
WorkerSockets = Annotated[Literal["auto"] | OptionalPath, BeforeValidator(_warn_of_none)]


@dataclass(frozen=True, config=CONFIG)
class GatewayOptions(Options):
    """Options of the gateway: flags of ``mmdet3d-serve gateway``, variables ``MMDET3D_SERVE_GATEWAY_*``."""

    SCOPE: ClassVar[str] = "gateway_"
    UNSCOPED: ClassVar[tuple[str, ...]] = ("max_frame_bytes",)

    host: Text = option("127.0.0.1", "IP", "address to listen on", common=True)
    port: int = option(8000, "PORT", "port to listen on; 0 picks a free one", common=True, ge=0, le=65535)
    grpc_port: OptionalCount = option(
        None,
        "PORT",
        "port for the Open Inference Protocol over gRPC (needs the grpc extra); 0 picks a free one",
        common=True,
        ge=0,
        le=65535,
    )
    gateways: int = option(
        1, "N", "gateway processes on the port; limits in total are divided among them", ge=1, le=64
    )
    inference_url: Url = option("http://127.0.0.1:8080", "URL", "TorchServe's inference address", common=True)
    management_url: ManagementUrl = option(
        "http://127.0.0.1:8081",
        "URL",
        "TorchServe's management address, or unix:PATH of its socket",
        common=True,
    )
    backend_key_file: OptionalPath = option(
        None, "FILE", "TorchServe's key_file.json, if it runs in token mode"
    )
    direct_batches: Flag = option(
        True,
        "",
        "send batches to the workers' sockets if TorchServe was started together with the gateway, and through "
        "TorchServe only if that fails; false: all through TorchServe",
    )
    worker_sockets: WorkerSockets = option(
        "auto",
        "DIR",
        "folder with the sockets of TorchServe's workers; auto: known to the process that starts both",
        private=True,
    )
    backend_request_bytes: int = option(64 * MIB, "BYTES", "TorchServe's max_request_size", ge=1)
    backend_timeout_s: float = option(
        130.0, "S", "longest wait for one batch; more than TorchServe's own limit", ge=0.001
    )

    batch_frames: int = option(16, "N", "most frames in a batch", common=True, ge=1, le=4096)
    batch_points: int = option(
        BATCH_POINTS, "POINTS", "most points in a batch of point clouds, summed", common=True, ge=1
    )
    batch_pixels: int = option(
        BATCH_PIXELS, "PIXELS", "most pixels in a batch of images, each counted as the largest", ge=1
    )
    batch_bytes: int = option(BATCH_BYTES, "BYTES", "most bytes in a batch", ge=1)
    prefetch_batches: int = option(
        1, "N", "batches sent ahead per model while all its workers are busy", ge=0
    )
    lead_time_s: float = option(
        0.002,
        "S",
        "how long before a worker is expected to be free a batch that is not full is sent; 0: never",
        ge=0,
    )

    max_frame_bytes: int = option(MAX_FRAME_BYTES, "BYTES", "largest frame", common=True, ge=1)
    max_body_bytes: int = option(64 * MIB, "BYTES", "largest request body", common=True, ge=1)
    compress_from_bytes: int = option(
        64 * 1024,
        "BYTES",
        "shortest answer that is compressed for a client that accepts gzip, or zstd where Python has it; 0: none is",
        ge=0,
    )
    max_json_bytes: int = option(
        10 * MIB, "BYTES", "largest JSON in a request, strings of base64 not counted", ge=1024
    )
    max_json_values: int = option(
        500_000, "N", "most values in the JSON of a request: elements of lists, members of objects", ge=1024
    )
    max_frames_per_request: int = option(64, "N", "most frames in one request", ge=1)
    max_pending_frames: int = option(
        256, "N", "frames waiting or running in total; more are answered 429", common=True, ge=1
    )
    max_pending_bytes: int = option(
        512 * MIB, "BYTES", "bytes held for requests in total; more are answered 429", ge=1
    )

    canary: CanaryShares = option(
        (),
        "MODEL:VERSION=SHARE",
        "share of the requests for a model without a version that this version answers, such as second:2.0=0.05; the "
        "rest is for the default version",
        common=True,
    )
    shadow: ShadowShares = option(
        (),
        "MODEL:VERSION=SHARE",
        "share of a model's frames that this version gets as well; its answers are compared and counted, not sent",
        common=True,
    )
    rollout_file: OptionalPath = option(
        None,
        "FILE",
        "file of such shares, read again when it changes; each line is canary or shadow, a blank and a share",
    )
    shadow_frames: int = option(16, "N", "most frames on their way to shadows; more are dropped", ge=1)
    shadow_bytes: int = option(
        64 * MIB, "BYTES", "most bytes of frames on their way to shadows and of their answers", ge=1
    )
    shadow_wait_s: float = option(
        2.0, "S", "how long such a frame may wait for a worker that has nothing else to do", ge=0.001
    )

    client_share: float = option(
        0.75,
        "SHARE",
        "part of the pending frames and bytes, and of the connections, that one client may hold: an API key, or an "
        "address if there are no keys; 1 if all clients come through one proxy",
        gt=0,
        le=1,
    )
    track_sessions: int = option(
        64, "N", "sequences whose objects are tracked at a time; one more is answered 429; 0: none", ge=0
    )
    track_idle_s: float = option(60.0, "S", "how long a sequence without a request is kept", ge=0.001)
    tracks_per_session: int = option(1024, "N", "most tracks of a sequence at a time", ge=1, le=16384)
    trusted_proxies: Names = option(
        ("127.0.0.1",), "IP", "proxies whose X-Forwarded-For names the client; an address or a network each"
    )
    max_connections: int = option(
        4096, "N", "open connections in total; a further one is answered 503 and closed", ge=1
    )

    max_grpc_streams: int = option(
        64,
        "N",
        "open streams of frames over gRPC in total, and as many watches of health; a further one is answered "
        "RESOURCE_EXHAUSTED",
        ge=1,
    )

    timeout_s: float = option(
        30.0, "S", "deadline of a request that names none with timeout_ms", common=True, ge=0.001
    )
    max_timeout_s: float = option(
        300.0, "S", "longest deadline that a request may name", common=True, ge=0.001
    )
    header_timeout_s: float = option(
        10.0, "S", "longest time for a connection to bring the header of a request", ge=0.001
    )
    body_timeout_s: float = option(30.0, "S", "longest time that a body may take to arrive", ge=0.001)
    client_stall_timeout_s: float = option(
        10.0,
        "S",
        "time in which a client must bring, or take, what client_bytes_per_s asks for; else it is cut",
        ge=0.001,
    )
    client_bytes_per_s: int = option(
        4096,
        "BYTES",
        "least rate of a body that arrives and of an answer that is read, bytes per second",
        ge=1,
    )
    keep_alive_s: float = option(15.0, "S", "how long an idle connection is kept", ge=0.001)
    max_requests_per_connection: int = option(
        0, "N", "requests after which a connection is closed, so that clients spread anew; 0: never", ge=0
    )
    stall_timeout_s: float = option(120.0, "S", "a batch that runs longer turns readiness red", ge=0.001)
    shutdown_delay_s: float = option(
        0.0, "S", "after SIGTERM, keep answering for so long while readiness is red", common=True, ge=0
    )
    graceful_timeout_s: float = option(
        25.0, "S", "after that, how long requests in flight may take to finish", common=True, ge=0
    )

    api_keys_file: OptionalPath = option(
        None, "FILE", "file with one API key per line; requests then need one", common=True
    )
    api_keys: Names = option(
        (), "KEY", "API keys; no flag, because a process list shows flags", flag=False, repr=False
    )
    cors_origins: Names = option((), "URL", "origins whose pages may call", common=True)
    uri_prefixes: Names = option(
        (), "URI", "allow frames by reference below these, such as s3://bucket/frames/", common=True
    )
    uri_timeout_s: float = option(
        10.0, "S", "longest time that reading a frame by reference may take", ge=0.001
    )
    uri_private_hosts: Flag = option(
        False, "", "let web addresses below uri_prefixes lead to private networks"
    )
    watch_window_s: float = option(
        3600.0, "S", "sliding window of frames that is compared with the model's reference", ge=1
    )
    watch_window_frames: int = option(
        200, "N", "least frames of a window that is compared; fewer say little", ge=1
    )
    watch_learn_frames: int = option(
        1000,
        "N",
        "first frames of a model that become its reference if its archive has none; each process learns anew",
        ge=40,
    )
    sample: OptionalText = option(
        None,
        "URI",
        "keep a sample of frames with their answers there, for labelling: a folder or s3://BUCKET/PREFIX",
        common=True,
    )
    sample_share: float = option(0.01, "SHARE", "share of the answered frames to keep", gt=0, le=1)
    sample_per_minute: int = option(6, "N", "most frames kept in a minute", ge=1)
    sample_days: float = option(30.0, "DAYS", "how long kept frames stay", gt=0, le=36500)
    sample_bytes: int = option(
        10 * 1024 * MIB, "BYTES", "bytes of kept frames; beyond them the oldest are removed", ge=1
    )
    ui: Flag = option(True, "", "serve the page at /, which shows frames and detections", common=True)
    require_models: Names = option((), "NAME", "ready only when these models are", common=True)
    log_format: Literal["json", "text"] = option("json", "", "format of log lines", common=True)
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "", "lowest level that is logged", common=True
    )
    otlp_endpoint: OptionalText = option(
        None, "URL", "send OpenTelemetry traces there (needs the otel extra)", common=True
    )

    def contradictions(self, spelling: Mapping[str, str]) -> Iterator[str]:
        """Yield a message for every pair of values that exclude each other.

        Args:
            spelling: name of each field as messages show it.
        """

        def show(name: str) -> str:
            value = getattr(self, name)
            return f"{spelling[name]}={value:g}" if isinstance(value, float) else f"{spelling[name]}={value}"

        if self.batch_bytes + _HEADER_BYTES > self.backend_request_bytes:
            yield f"{show('batch_bytes')} must leave 64 KiB of {show('backend_request_bytes')} for a header"
        if self.max_frame_bytes > self.batch_bytes:
            yield f"{show('max_frame_bytes')} is over {show('batch_bytes')}: such a frame fits no batch"
        if self.max_body_bytes < self.max_frame_bytes:
            yield f"{show('max_body_bytes')} is below {show('max_frame_bytes')}"
        for pending, request in (
            ("max_pending_bytes", "max_body_bytes"),
            ("max_pending_frames", "max_frames_per_request"),
        ):
            if getattr(self, pending) < getattr(self, request):
                yield f"{show(pending)} is below {show(request)}: the largest request could never be admitted"
        if self.timeout_s > self.max_timeout_s:
            yield f"{show('timeout_s')} is over {show('max_timeout_s')}"
        for name in ("canary", "shadow"):
            if self.rollout_file is not None and getattr(self, name):
                yield f"{spelling['rollout_file']} replaces {spelling[name]}; set one of them"
        if "*" in self.cors_origins and (self.api_keys or self.api_keys_file):
            yield f"{spelling['cors_origins']}=* lets every page use a visitor's API key; list the origins"

    @property
    def json_bounds(self) -> JsonBounds:
        """The bounds on JSON in a request."""
        return JsonBounds(max_values=self.max_json_values, max_bytes=self.max_json_bytes)

    def compresses(self, nbytes: int) -> bool:
        """Whether an answer of so many bytes is long enough to be compressed."""
        return 0 < self.compress_from_bytes <= nbytes

    @property
    def socket_folder(self) -> Path | None:
        """The folder with the workers' sockets; None sends all batches through TorchServe."""
        folder = self.worker_sockets if self.direct_batches else None
        return None if folder == "auto" else folder

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
