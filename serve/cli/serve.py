"""``mmdet3d-serve serve``: serve archives in the foreground; the work is `serve.torchserve.supervisor`'s."""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from serve import logs
from serve.cli.entry import command_parser, stage_reporter
from serve.cli.flags import add_flags, add_help_all, values_of
from serve.errors import SettingsError
from serve.gateway.options import GatewayOptions
from serve.settings import Settings, warn_renamed
from serve.torchserve import ServedModel, TorchServeOptions
from serve.torchserve.management import split_url
from serve.torchserve.supervisor import Service, archives_of, gateway_options

__all__ = ["STATE_DIR", "archive_demo", "main", "serve_until_stopped", "stoppable"]

STATE_DIR = Path(".state")
STORE = Path("model-store")
CONTAINER_STORE = Path("/home/model-server/model-store")
EVERYWHERE = "0.0.0.0"
# Options of the gateway that are the same for TorchServe, or that the supervisor knows.
KNOWN_TO_SERVE = (
    "inference_url",
    "management_url",
    "backend_key_file",
    "backend_request_bytes",
    "backend_timeout_s",
    "max_frame_bytes",
    "worker_sockets",
)


@contextmanager
def stoppable() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the block as Ctrl-C does, by KeyboardInterrupt."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    former = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None) -> int:
    """Serve until Ctrl-C, SIGTERM or ``mmdet3d-serve stop``.

    Returns 0 when it was stopped, the exit code of what ended by itself otherwise.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.stop:
        from serve.cli import stop

        warn_renamed("mmdet3d-serve serve --stop", "mmdet3d-serve stop")
        return stop.stop_all(Path(str(values_of(args, TorchServeOptions).get("state_dir", STATE_DIR))))
    settings = Settings.build(values_of(args, Settings))
    if args.container:
        return _serve_in_container(args, settings)
    options = _torchserve_options(args, settings, args.store or STORE, {"state_dir": STATE_DIR})
    service = _service(args, options, {"log_format": "text"}, lenient=not args.models)
    _report_ports(options)
    with stoppable():
        return serve_until_stopped(service, _print_ready)


def _serve_in_container(args: argparse.Namespace, settings: Settings) -> int:
    """Serve what can be served of a store; an empty one means the demo SECOND."""
    logs.set_up("json", "info")
    store = args.store or CONTAINER_STORE
    if store.exists() and not os.access(store, os.R_OK | os.X_OK):
        raise SettingsError(
            f"user {os.getuid()} may not read the model store {store}; make it readable "
            "(`chmod -R a+rX`), or run as its owner"
        )
    defaults: dict[str, object] = {}
    if settings.open_torchserve and (args.no_gateway or not _has_keys(args, store)):
        defaults |= {"inference_host": EVERYWHERE, "metrics_host": EVERYWHERE}
    if settings.open_management:
        defaults |= {"management_host": EVERYWHERE, "token_authorization": True}
    with stoppable(), tempfile.TemporaryDirectory(prefix="mmdet3d-serve-demo-") as folder:
        if not args.models and not any(store.glob("*.mar")):
            print(
                f"{store} holds no archive: serving the demo SECOND",
                file=sys.stderr,
                flush=True,
            )
            store = archive_demo(Path(folder))
        options = _torchserve_options(args, settings, store, defaults)
        if settings.open_management and not options.token_authorization:
            raise SettingsError(
                "management of a container is open only with TorchServe's tokens: leave out "
                "--no-token-authorization, or --open-management (MMDET3D_SERVE_OPEN_MANAGEMENT)"
            )
        service = _service(args, options, {"host": EVERYWHERE}, lenient=True)
        _report_ports(options)
        return serve_until_stopped(service, _print_ready)


def _has_keys(args: argparse.Namespace, store: Path) -> bool:
    """Whether the gateway asks for API keys."""
    options = gateway_options(TorchServeOptions(store), values_of(args, GatewayOptions))
    return bool(options.api_keys or options.api_keys_file)


def _report_ports(options: TorchServeOptions) -> None:
    """Print which ports of TorchServe others can reach past the gateway."""
    for use, host, port in (
        ("predictions", options.inference_host, options.inference_port),
        ("metrics", options.metrics_host, options.metrics_port),
    ):
        if not ipaddress.ip_address(host).is_loopback:
            print(
                f"warning: TorchServe's own {use} listen on {host} port {port}, without the gateway's API keys and "
                "limits",
                file=sys.stderr,
                flush=True,
            )


def archive_demo(folder: Path) -> Path:
    """Put the archive of the demo SECOND into `folder`; returns the folder."""
    from serve.convert import Conversion, convert

    assets = Path(__file__).parents[1] / "assets"
    convert(
        Conversion(
            assets / "second_demo.py",
            assets / "second_demo.pth",
            folder,
            "second",
            force=True,
            report=stage_reporter(),
        )
    )
    return folder


def serve_until_stopped(service: Service, report_ready: Callable[[Service, float], None]) -> int:
    """Start, call `report_ready` with the seconds it took, wait for Ctrl-C or the service's own end.

    Returns 0 when it was stopped and everything in flight was answered, else the code of what ended.
    """
    began = time.perf_counter()
    models = ", ".join(model.name or Path(model.archive).stem for model in service.torchserve.options.models)
    print(f"starting TorchServe with {models} …", file=sys.stderr, flush=True)
    code = 0
    with service:
        try:
            report_ready(service, time.perf_counter() - began)
            code = service.wait()
        except KeyboardInterrupt:
            print("\nstopping …", file=sys.stderr, flush=True)
        drained = service.stop()
        code = code or drained
    if code:
        print(f"error: ended with code {code}", file=sys.stderr)
        return code
    print("stopped", file=sys.stderr)
    return 0


def _print_ready(service: Service, seconds: float) -> None:
    server = service.torchserve
    print(f"ready after {seconds:.1f} s")
    best = service.gateway_url or server.inference_url
    for name in server.models():
        for worker in server.workers(name):
            print(f"model        {name} {worker.version}, worker {worker.pid}")
        print(f"predictions  curl -T FRAME {best}/predictions/{name}")
    if service.gateway_url is not None:
        print(f"gateway      {service.gateway_url}/docs")
    if service.page_url is not None:
        print(f"page         {service.page_url}")
    print(f"torchserve   {server.inference_url}/predictions/…")
    address, management = split_url(server.management_url)
    print(f"management   {f'curl --unix-socket {management} ' if management else ''}{address}/models")
    print(f"metrics      {server.metrics_url}/metrics")
    for use, token in server.tokens().items():
        print(f"token        {use}: {token}")
    print("Ctrl-C stops it.", flush=True)


def _torchserve_options(
    args: argparse.Namespace, settings: Settings, store: Path, defaults: Mapping[str, object]
) -> TorchServeOptions:
    models = [ServedModel.parse(text, settings.workers) for text in args.models]
    return TorchServeOptions.build(
        values_of(args, TorchServeOptions),
        defaults=defaults,
        fixed={
            "model_store": store,
            "models": models or archives_of(store, settings.workers),
            "open_management": settings.open_management,
        },
    )


def _service(
    args: argparse.Namespace,
    options: TorchServeOptions,
    gateway_defaults: Mapping[str, object],
    *,
    lenient: bool,
) -> Service:
    gateway = None
    if not args.no_gateway:
        gateway = gateway_options(options, values_of(args, GatewayOptions), defaults=gateway_defaults)
    return Service(options, gateway, lenient=lenient, report=stage_reporter())


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "serve",
        "Serve archives with TorchServe and the gateway in the foreground until Ctrl-C or SIGTERM. Options of the "
        "gateway are environment variables too: --gateway-port is MMDET3D_SERVE_GATEWAY_PORT. docs/settings.md lists "
        "every flag and variable.",
        [
            "serve",
            "serve --models second --workers 2",
            "serve --store /srv/models --gateway-host 0.0.0.0 --gateway-port 9000",
        ],
    )
    add_help_all(parser)
    parser.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help=f"folder that holds the archives (default: {STORE}, in a container {CONTAINER_STORE})",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="NAME[=FILE.mar]",
        help="what to serve, and under which name (default: every archive of the store)",
    )
    add_flags(parser, Settings, title=None, only=("workers",))
    parser.add_argument("--no-gateway", action="store_true", help="run TorchServe alone")
    add_flags(parser, Settings, title=None, only=("open_management",))
    parser.add_argument(
        "--container",
        action="store_true",
        help="defaults of a container: listen on all interfaces, log JSON, serve the rest if a named archive is "
        "rejected, serve the demo model if the store is empty",
    )
    parser.add_argument("--stop", action="store_true", help=argparse.SUPPRESS)
    add_flags(parser, TorchServeOptions, title="TorchServe", defaults={"state_dir": STATE_DIR})
    add_flags(
        parser,
        GatewayOptions,
        title="gateway",
        prefix="gateway-",
        leave_out=KNOWN_TO_SERVE,
        common=(
            "host",
            "port",
            "timeout_s",
            "batch_points",
            "api_keys_file",
            "shutdown_delay_s",
            "log_level",
        ),
        defaults={"log_format": "text, in a container json"},
    )
    return parser
