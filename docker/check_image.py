"""Build the image without a container engine, start it, and request detections from inside.

`make image-check` runs this, as root, on Debian with the packages `buildah` and `debootstrap`. It takes minutes and
gigabytes, so neither `make test` nor continuous integration does. A base image is made with debootstrap (Debian's own
Python), the Dockerfile is built on it with `buildah --storage-driver vfs bud --isolation chroot`, and the image is run
as a user without an entry in its /etc/passwd. The response, the written files and the exit code are checked.

Not covered: the additions of an engine (namespaces, cgroups, a read-only root file system), and the base image that the
Dockerfile names.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.conftest import pick_free_ports

ROOT = Path(__file__).parents[1]
USER = "4711:0"  # not in the image's /etc/passwd; group 0 is what OpenShift gives
BASE_PACKAGES = "python3,python3-venv,ca-certificates,curl"
START_S = 400.0
STOP_S = 60.0
# A part of the command line of every process of the service, and its name.
ROLES = {
    "model_service_worker.py": "worker",
    "org.pytorch.serve.ModelServer": "TorchServe (Java)",
    "serve.cli.gateway": "gateway",
    "serve serve --container": "supervisor",
}


def print_heading(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


class Buildah:
    """Buildah with its own storage, so that removing a folder removes everything."""

    def __init__(self, folder: Path) -> None:
        self.base = ["buildah", "--storage-driver", "vfs", "--root", str(folder / "storage"),
                     "--runroot", str(folder / "run")]  # fmt: skip

    def __call__(self, *words: str, quiet: bool = False) -> str:
        """Run a subcommand; its output is returned when `quiet`, else shown."""
        command = [*self.base, *words]
        if quiet:
            return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        subprocess.run(command, check=True)
        return ""


def make_base(buildah: Buildah, folder: Path, root: Path | None, suite: str) -> str:
    """Build a base image with Debian's Python; return its name."""
    if root is None:
        root = folder / "base"
        print_heading(f"debootstrap {suite} with {BASE_PACKAGES}")
        log = folder / "debootstrap.log"
        with log.open("w") as file:
            command = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", suite, str(root)]
            if subprocess.run(command, stdout=file, stderr=file, check=False).returncode:
                sys.exit(f"debootstrap failed:\n{log.read_text()[-2000:]}")
    container = buildah("from", "scratch", quiet=True)
    buildah("add", "--quiet", container, str(root), "/", quiet=True)
    buildah("commit", "--quiet", "--rm", container, "localhost/base", quiet=True)
    return "localhost/base"


def build(buildah: Buildah, base: str, target: str, arguments: argparse.Namespace) -> str:
    """Build a target of the Dockerfile; returns the image's name."""
    image = f"localhost/mmdet3d-serve-{target}"
    words = ["bud", "--isolation", "chroot", "--format", "docker", "--target", target, "--tag", image,
             "--build-arg", f"BASE_IMAGE={base}"]  # fmt: skip
    for each in arguments.build_arg:
        words += ["--build-arg", each]
    for each in arguments.volume:
        words += ["--volume", each]
    if arguments.pip_conf:
        words += ["--secret", f"id=pip_conf,src={arguments.pip_conf}"]
    print_heading(f"buildah --storage-driver vfs bud --isolation chroot --target {target}")
    began = time.monotonic()
    buildah(*words, str(ROOT / "docker" / "serve"))
    print(f"built in {time.monotonic() - began:.0f} s")
    return image


def describe(buildah: Buildah, image: str) -> None:
    """Print the image's configuration and check user and stop signal."""
    config = json.loads(buildah("inspect", "--type", "image", image, quiet=True))["Docker"]["config"]
    print_heading(f"{image}: configuration")
    for key in ("User", "Entrypoint", "ExposedPorts", "StopSignal", "Healthcheck", "Labels"):
        print(f"{key:<13}{json.dumps(config.get(key))}")
    assert config["User"] == "1000:1000" and config["StopSignal"] == "SIGTERM"
    for line in buildah("images", "--json", quiet=True).splitlines():
        if '"size"' in line:
            print(line.strip())


@contextmanager
def mounted(buildah: Buildah, image: str) -> Iterator[tuple[str, Path]]:
    """Start a container of the image; return it and its root as a folder."""
    container = buildah("from", image, quiet=True)
    try:
        yield container, Path(buildah("mount", container, quiet=True))
    finally:
        buildah("rm", container, quiet=True)


def inside(buildah: Buildah, container: str, *command: str) -> list[str]:
    """Return the command line that runs a command in the container as `USER`, with this machine's network."""
    return [*buildah.base, "run", "--isolation", "chroot", "--user", USER, container, "--", *command]


def name_role(command: Sequence[str]) -> str | None:
    """Return the part that a process plays in the service by its command line, None if it plays none."""
    words = " ".join(command)
    return next((role for part, role in ROLES.items() if part in words and "guard.py" not in words), None)


def show_memory(service: psutil.Process) -> None:
    """Print the memory of each process of the service, MB of 10^6 bytes: resident and unshared."""
    for each in service.children(recursive=True):
        if each.name() not in ("python", "python3", "java"):
            continue
        role = name_role(each.cmdline())
        if role:
            held = each.memory_full_info()
            print(f"memory  {role:<18}{held.rss / 1e6:5.0f} MB resident, {held.uss / 1e6:5.0f} MB unshared")


def serve_and_ask(buildah: Buildah, container: str, root: Path, caches: str) -> None:
    """Start the image's entry point, send it a frame from inside, stop it as an engine would."""
    gateway, inference, management, metrics = pick_free_ports(4)
    config = json.loads(buildah("inspect", container, quiet=True))["Docker"]["config"]
    words = ["--gateway-port", str(gateway), "--inference-port", str(inference),
             "--management-port", str(management), "--metrics-port", str(metrics)]  # fmt: skip
    marker = root.parent / "marker"
    marker.touch()
    print_heading(f"started as user {USER}: {' '.join([*config['Entrypoint'], *words])}")
    began = time.monotonic()
    service = subprocess.Popen(inside(buildah, container, *config["Entrypoint"], *words), cwd=ROOT)
    try:
        url = f"http://127.0.0.1:{gateway}"
        ready = inside(buildah, container, "curl", "-fsS", f"{url}/health/ready")
        while subprocess.run(ready, capture_output=True, check=False).returncode:
            assert service.poll() is None, f"it ended with {service.returncode}"
            assert time.monotonic() - began < START_S, "it was not ready in time"
            time.sleep(1)
        print(f"ready {time.monotonic() - began:.0f} s after its start, caches {caches}")
        shutil.copyfile(ROOT / "serve" / "assets" / "sample.bin", root / "tmp" / "frame.bin")
        (root / "tmp" / "frame.bin").chmod(0o644)
        curl = [
            "curl",
            "-sS",
            "-T",
            "/tmp/frame.bin",
            "-H",
            "X-Max-Detections: 2",
            f"{url}/predictions/second",
        ]
        print_heading(f"from inside: {' '.join(curl)}")
        answer = subprocess.run(inside(buildah, container, *curl), check=True, capture_output=True, text=True)
        print(answer.stdout)
        assert len(json.loads(answer.stdout)["scores_3d"]) == 2
        show_memory(psutil.Process(service.pid))
        ids = inside(buildah, container, "sh", "-c", "id; cat /proc/self/status | grep Cap; ls -ld $HOME")
        subprocess.run(ids, check=True)
        written = [
            str(path.relative_to(root))
            for path in root.rglob("*")
            if not path.is_symlink() and path.is_file() and path.stat().st_mtime > marker.stat().st_mtime
        ]
        outside = [path for path in written if path.split("/")[0] not in ("tmp", "proc", "sys", "dev")]
        # Files that buildah writes into every container.
        outside = [
            path for path in outside if path not in ("etc/hosts", "etc/resolv.conf", "run/.containerenv")
        ]
        print(f"files written outside /tmp: {outside or 'none'}")
        assert not outside
        below = psutil.Process(service.pid).children(recursive=True)
        (first,) = [each for each in below if each.name() == "dumb-init"]
        print_heading("SIGTERM to process 1")
        first.terminate()
        code = service.wait(STOP_S)
        print(f"exit code {code}")
        assert code == 0
    finally:
        if service.poll() is None:
            for each in psutil.Process(service.pid).children(recursive=True):
                each.kill()
            service.kill()
            service.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Build, run, check, clean up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="for the Dockerfile"
    )
    parser.add_argument(
        "--volume", action="append", default=[], metavar="FROM:TO:ro", help="seen by the build"
    )
    parser.add_argument("--pip-conf", type=Path, metavar="FILE", help="pip's configuration for the build")
    parser.add_argument("--base-root", type=Path, metavar="DIR", help="what debootstrap made before")
    parser.add_argument("--suite", default="bookworm", help="of Debian (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("/var/tmp"), help="for gigabytes, removed afterwards"
    )
    arguments = parser.parse_args(argv)
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing or os.getuid():
        print(
            f"error: needs root and Debian's packages buildah and debootstrap; missing: {missing}",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-image-", dir=arguments.folder) as name:
        folder = Path(name)
        buildah = Buildah(folder)
        base = make_base(buildah, folder, arguments.base_root, arguments.suite)
        gateway = build(buildah, base, "gateway", arguments)
        describe(buildah, gateway)
        with mounted(buildah, gateway) as (container, _):
            usage = subprocess.run(
                inside(buildah, container, "python", "-m", "serve", "gateway", "--help"),
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            print(usage.stdout.partition("\n")[0])
        image = build(buildah, base, "serve", arguments)
        describe(buildah, image)
        with mounted(buildah, image) as (container, root):
            for caches in ("empty", "kept from before"):
                serve_and_ask(buildah, container, root, caches)
    print_heading("removed all temporary files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
