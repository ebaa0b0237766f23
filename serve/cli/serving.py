"""The command that serves archives in the foreground, and the one that stops what it finds running.

Knows the arguments and the words; the work is `serve.torchserve`'s and `serve.archive`'s.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from serve import archive
from serve.errors import ArchiveError, SettingsError
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions, stop_running

__all__ = ["STATE_DIR", "serve_archives", "serve_until_stopped", "stoppable"]

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


def serve_archives(argv: Sequence[str] | None) -> int:
    """``serve_archives.py --store DIR --models NAME …``: serve until Ctrl-C, SIGTERM or ``--stop`` elsewhere.

    Returns 0 when it was stopped, 1 when TorchServe ended by itself.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.stop:
        ended = stop_running(args.state_dir)
        print("\n".join(f"stopped {address}" for address in ended) or "nothing of ours is running")
        return 0
    models = [ServedModel.parse(text, args.workers) for text in args.models] or _all_of(
        args.store, args.workers
    )
    for model in models:
        _verify(args.store / model.archive)
    with stoppable():
        return serve_until_stopped(TorchServe(_options(args, models)), _tell)


def serve_until_stopped(server: TorchServe, tell: Callable[[TorchServe, float], None]) -> int:
    """Start, `tell` (with the seconds it took) once every model is ready, wait for Ctrl-C or the server's own end.

    Returns 0 when it was stopped, 1 when TorchServe ended by itself.
    """
    began = time.perf_counter()
    models = ", ".join(model.name or Path(model.archive).stem for model in server.options.models)
    print(f"starting TorchServe with {models} …", file=sys.stderr, flush=True)
    with server:
        try:
            tell(server, time.perf_counter() - began)
            while server.wait(timeout_s=3600) is None:
                pass
        except KeyboardInterrupt:
            print("\nstopping …", file=sys.stderr, flush=True)
        code = server.poll()
    if code:
        print(f"error: TorchServe ended by itself with code {code}", file=sys.stderr)
        return 1
    print("stopped", file=sys.stderr)
    return 0


def _tell(server: TorchServe, seconds: float) -> None:
    print(f"ready after {seconds:.1f} s")
    for name in server.models():
        for worker in server.workers(name):
            print(f"model        {name} {worker.version}, worker {worker.pid}")
        print(f"predictions  curl -T FRAME {server.inference_url}/predictions/{name}")
    print(f"management   {server.management_url}/models")
    print(f"metrics      {server.metrics_url}/metrics")
    for use, token in server.tokens().items():
        print(f"token        {use}: {token}")
    print("Ctrl-C stops it.", flush=True)


def _verify(path: Path) -> None:
    try:
        archive.verify(path)
    except ArchiveError as error:
        raise type(error)(f"{path}: {error}") from None


def _all_of(store: Path, workers: int) -> list[ServedModel]:
    archives = sorted(path.name for path in store.glob("*.mar"))
    if not archives:
        raise SettingsError(f"{store} holds no archive; make one with `make archive MODEL=second`")
    return [ServedModel(name, workers=workers) for name in archives]


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
    parser = argparse.ArgumentParser(
        description="Serve archives with TorchServe in the foreground until Ctrl-C or SIGTERM."
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
    parser.add_argument("--stop", action="store_true", help="end the servers noted in --state-dir, and stop")
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
