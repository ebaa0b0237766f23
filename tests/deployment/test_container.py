"""The service where a container would have it: a root file system that cannot be written, a user without a name.

A mount namespace and a user namespace of our own stand in for an engine. What an engine itself does is not shown
here; `make image-check` builds and runs the image.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# /tmp is new and empty, all else read-only; then another user, with no capability left. What the test runs on may
# itself lie below /tmp ($KEPT): it stays visible there, and read-only.
CONFINE = """
mount -t tmpfs -o mode=1777,noexec,nosuid,nodev tmpfs "$NEW"
for kept in $KEPT; do
    mkdir -p "$NEW/${kept#/tmp/}"
    mount --bind "$kept" "$NEW/${kept#/tmp/}"
    mount -o remount,bind,ro "$NEW/${kept#/tmp/}"
done
mount --rbind "$NEW" /tmp
cd "$PWD"
mount -o remount,bind,ro /
exec unshare --user --map-user=4711 --map-group=0 "$@"
"""
# Starts the service, asks it, sends SIGTERM, and tells what it saw. Runs inside.
SCRIPT = """
import getpass, http.client, json, os, signal, subprocess, sys, time
before = set(os.listdir("/tmp"))
from tests.conftest import pick_free_ports
from serve.synthetic.scenes import sample_frame
try:
    open("/work-file", "w")
except OSError as error:
    print("root:", error.strerror)
print("user:", os.getuid(), os.path.expanduser("~"))
inference, management, metrics, gateway = map(str, pick_free_ports(4))
command = [sys.executable, "-m", "serve", "up", "--store", "/home/model-server/model-store",
           "--inference-port", inference, "--management-port", management,
           "--metrics-port", metrics, "--gateway-port", gateway]
service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
for line in service.stdout:
    if "Ctrl-C" in line:
        break
else:
    sys.exit(f"ended with {service.wait()}")
connection = http.client.HTTPConnection("127.0.0.1", int(gateway), timeout=60)
connection.request("POST", "/predictions/second", sample_frame())
answer = connection.getresponse()
print("answer:", answer.status, len(json.loads(answer.read())["scores_3d"]) > 2)
print("check:", subprocess.run([sys.executable, "-I", "-S", "docker/serve/healthcheck.py"], stdout=subprocess.DEVNULL,
      env={"MMDET3D_SERVE_GATEWAY_PORT": gateway}).returncode)
service.send_signal(signal.SIGTERM)
service.stdout.read()
print("code:", service.wait())
print("left:", sorted(set(os.listdir("/tmp")) - before
      - {"mmdet3d-serve-cache", "mmdet3d-serve-4711", ".config", ".cache"}))
"""


def confined(new: Path, *command: str, **environment: str) -> list[str]:
    """A command line that runs `command` with this environment; `new` is a folder to mount on."""
    needed = {ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    kept = [path for path in needed if path.is_relative_to("/tmp")]
    # None inside another: what is mounted read-only takes no mount points.
    kept = [path for path in kept if not any(path.is_relative_to(other) for other in {*kept} - {path})]
    variables = [f"{name}={value}" for name, value in environment.items()]
    return [
        "env", f"NEW={new}", f"KEPT={' '.join(map(str, kept))}", "unshare", "--user", "--map-root-user", "--mount",
        "sh", "-ec", CONFINE, "sh", "env", *variables, *command,
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def namespaces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    command = confined(tmp_path_factory.mktemp("new"), "true")
    tried = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no namespaces here: {tried.stderr.strip()}")
    yield


@pytest.mark.torchserve
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_service_runs_with_read_only_root_and_unknown_user(tmp_path: Path) -> None:
    # As the Dockerfile sets them.
    variables = {
        "HOME": "/tmp", "USER": "model-server", "MMDET3D_SERVE_CACHE_DIR": "/tmp/mmdet3d-serve-cache",
        "TMPDIR": "/tmp", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    ran = subprocess.run(
        confined(tmp_path, sys.executable, "-c", SCRIPT, **variables),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    told = dict(line.split(": ", 1) for line in ran.stdout.splitlines() if ": " in line)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert told["root"] == "Read-only file system"
    assert told["user"] == "4711 /tmp"
    assert told["answer"] == "200 True"
    assert told["check"] == "0"
    assert told["code"] == "0"
    assert told["left"] == "[]"


def test_unreadable_store_returns_2_with_one_error_line(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir(mode=0)
    ran = subprocess.run(
        ["unshare", "--user", "--map-user=4711", sys.executable, "-m", "serve", "up", "--store", str(store)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert f"may not read the model store {store}" in ran.stderr
