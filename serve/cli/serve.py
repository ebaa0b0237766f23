"""``mmdet3d-serve serve``: serve archives in the foreground; the work is `serve.torchserve.supervisor`'s."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from serve import logs
from serve.cli.entry import command_parser
from serve.errors import SettingsError
from serve.settings import Settings
from serve.torchserve import ServedModel, TorchServeOptions
from serve.torchserve.supervisor import Service, archives_of

__all__ = ["STATE_DIR", "demonstration", "main", "serve_until_stopped", "stoppable"]

STATE_DIR = Path(".state")


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
    if args.container:
        parser.set_defaults(**_container_defaults())
        return _serve_in_container(parser.parse_args(argv))
    with stoppable():
        return serve_until_stopped(_service(args, lenient=False, log_format="text"), _print_ready)


def _container_defaults() -> dict[str, Any]:
    settings = Settings.from_environment()
    everywhere = "0.0.0.0"
    return {
        "store": Path("/home/model-server/model-store"),
        "workers": settings.workers,
        "inference_host": everywhere,
        "metrics_host": everywhere,
        "gateway_host": settings.gateway.get("host", everywhere),
        "gateway_port": settings.gateway.get("port", "8000"),
        "management_host": everywhere if settings.open_management else "127.0.0.1",
        # Open management asks for tokens, always.
        "open_management": settings.open_management,
        "token_authorization": settings.open_management,
        "state_dir": None,
    }


def _serve_in_container(args: argparse.Namespace) -> int:
    """Serve what can be served of a store; an empty one means the demonstration SECOND."""
    logs.set_up("json", "info")
    if args.store.exists() and not os.access(args.store, os.R_OK | os.X_OK):
        raise SettingsError(
            f"user {os.getuid()} may not read the model store {args.store}; make it readable "
            "(`chmod -R a+rX`), or run as its owner"
        )
    with stoppable(), tempfile.TemporaryDirectory(prefix="mmdet3d-serve-demo-") as folder:
        if not args.models and not any(args.store.glob("*.mar")):
            print(
                f"{args.store} holds no archive: serving the demonstration SECOND",
                file=sys.stderr,
                flush=True,
            )
            args.store = demonstration(Path(folder))
        log_format = Settings.from_environment().gateway.get("log_format", "json")
        return serve_until_stopped(_service(args, lenient=True, log_format=log_format), _print_ready)


def demonstration(folder: Path) -> Path:
    """Put the archive of the demonstration SECOND into `folder`; returns the folder."""
    from serve.convert import Conversion, convert

    assets = Path(__file__).parents[1] / "assets"
    convert(
        Conversion(
            assets / "second_demo.py", assets / "second_demo.pth", folder, "second", force=True, report=_step
        )
    )
    return folder


def _step(step: str) -> None:
    print(f"  {step}", file=sys.stderr, flush=True)


def serve_until_stopped(service: Service, tell: Callable[[Service, float], None]) -> int:
    """Start, `tell` (with the seconds it took) once frames are answered, wait for Ctrl-C or the service's own end.

    Returns 0 when it was stopped and everything in flight was answered, else the code of what ended.
    """
    began = time.perf_counter()
    models = ", ".join(model.name or Path(model.archive).stem for model in service.torchserve.options.models)
    print(f"starting TorchServe with {models} …", file=sys.stderr, flush=True)
    code = 0
    with service:
        try:
            tell(service, time.perf_counter() - began)
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
    print(f"torchserve   {server.inference_url}/predictions/…")
    print(f"management   {server.management_url}/models")
    print(f"metrics      {server.metrics_url}/metrics")
    for use, token in server.tokens().items():
        print(f"token        {use}: {token}")
    print("Ctrl-C stops it.", flush=True)


def _service(args: argparse.Namespace, *, lenient: bool, log_format: str) -> Service:
    models = [ServedModel.parse(text, args.workers) for text in args.models] or archives_of(
        args.store, args.workers
    )
    flags = {"host": args.gateway_host, "port": str(args.gateway_port), "log_format": log_format}
    gateway = None if args.no_gateway else flags
    return Service(_options(args, models), gateway, lenient=lenient)


def _options(args: argparse.Namespace, models: Sequence[ServedModel]) -> TorchServeOptions:
    return TorchServeOptions(
        model_store=args.store,
        models=tuple(models),
        inference_host=args.inference_host,
        inference_port=args.inference_port,
        management_host=args.management_host,
        management_port=args.management_port,
        metrics_host=args.metrics_host,
        metrics_port=args.metrics_port,
        open_management=args.open_management,
        model_api=not args.no_model_api,
        token_authorization=args.token_authorization,
        max_request_bytes=args.max_request_mib << 20,
        response_timeout_s=args.response_timeout,
        startup_timeout_s=args.startup_timeout,
        gpus=args.gpus,
        log_level=args.log_level or "warn",
        echo_logs=args.log_level is not None,
        log_dir=args.log_dir,
        java_options=tuple(args.java_option),
        state_dir=args.state_dir,
    )


def _parser() -> argparse.ArgumentParser:
    default = TorchServeOptions(model_store=Path("model-store"))
    parser = command_parser(
        "serve",
        "Serve archives with TorchServe and the gateway in the foreground until Ctrl-C or SIGTERM. Options of the "
        "gateway beyond these are environment variables; `mmdet3d-serve gateway --help` lists them.",
        ["serve", "serve --models second --workers 2", "serve --store /srv/models --gateway-host 0.0.0.0"],
    )
    parser.add_argument(
        "--container",
        action="store_true",
        help="defaults of a container: listen on all interfaces, log JSON, serve the rest where an archive is "
        "rejected, serve the demonstration model where the store is empty",
    )
    parser.add_argument(
        "--store",
        type=Path,
        default=default.model_store,
        help="folder that holds the archives (default: %(default)s)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="NAME[=FILE.mar]",
        help="what to serve, and under which name; default: every archive of the store",
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="Python processes per model (default: %(default)s)"
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=STATE_DIR,
        help="folder where running servers are noted (default: %(default)s)",
    )
    for use in ("inference", "management", "metrics"):
        host, port = getattr(default, f"{use}_host"), getattr(default, f"{use}_port")
        parser.add_argument(
            f"--{use}-host", default=host, metavar="IP", help=f"address for {use} (default: %(default)s)"
        )
        parser.add_argument(
            f"--{use}-port",
            type=int,
            default=port,
            metavar="PORT",
            help=f"port for {use} (default: %(default)s)",
        )
    parser.add_argument(
        "--gateway-host",
        default="127.0.0.1",
        metavar="IP",
        help="address of the gateway (default: %(default)s)",
    )
    parser.add_argument(
        "--gateway-port",
        type=int,
        default=8000,
        metavar="PORT",
        help="port of the gateway (default: %(default)s)",
    )
    parser.add_argument("--no-gateway", action="store_true", help="TorchServe alone")
    parser.add_argument(
        "--open-management", action="store_true", help="allow --management-host beyond loopback"
    )
    parser.add_argument(
        "--no-model-api", action="store_true", help="no loading or removing of models at run time"
    )
    parser.add_argument("--token-authorization", action="store_true", help="ask for TorchServe's tokens")
    parser.add_argument(
        "--max-request-mib",
        type=int,
        default=default.max_request_bytes >> 20,
        metavar="MIB",
        help="largest request body, MiB (default: %(default)s)",
    )
    parser.add_argument(
        "--response-timeout",
        type=int,
        default=default.response_timeout_s,
        metavar="S",
        help="seconds after which a worker that has not answered is replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--startup-timeout",
        type=int,
        default=default.startup_timeout_s,
        metavar="S",
        help="seconds that loading may take (default: %(default)s)",
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs to use at most (default: all)")
    parser.add_argument(
        "--log-level",
        choices=("error", "warn", "info", "debug"),
        help="repeat TorchServe's log from this level on standard error",
    )
    parser.add_argument(
        "--log-dir", type=Path, help="keep log files in this folder (default: they go at the end)"
    )
    parser.add_argument(
        "--java-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="for Java, as --java-option=-Xmx2g",
    )
    return parser
