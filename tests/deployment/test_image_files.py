"""Dockerfile and health check: about the service that there is, and nothing in an image but that."""

from __future__ import annotations

import http.server
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import serve.torchserve.supervisor
from serve.cli.main import COMMANDS
from serve.cli.serve import CONTAINER_STORE
from serve.gateway.options import GatewayOptions
from serve.settings import PREFIX, Settings
from serve.torchserve import TorchServeOptions
from tests.conftest import pick_free_ports
from tests.deployment.conftest import ROOT
from tests.deployment.dockerfile import CONTEXT, DOCKER, DOCKERFILE, stages, words


def variables(stage: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in words(stage, "ENV") for pair in rest.split())


# The Dockerfile


def test_default_image_target_is_the_whole_service() -> None:
    assert list(stages())[-1] == "serve"


@pytest.mark.parametrize("stage", ["serve", "gateway"])
def test_image_runs_the_command_below_an_init(stage: str) -> None:
    (entrypoint,) = words(stage, "ENTRYPOINT")
    init, single, end, *command = json.loads(entrypoint)
    assert (init, single, end) == ("dumb-init", "--single-child", "--")
    assert command[:3] == ["python", "-m", "serve"] and command[3] in COMMANDS
    # Further words are options: there is no CMD that they would replace.
    assert not words(stage, "CMD")
    assert command[4:] == (["--container"] if stage == "serve" else [])


def test_image_check_recognizes_supervisor_and_gateway() -> None:
    spec = importlib.util.spec_from_file_location("check_image", DOCKER / "check_image.py")
    assert spec is not None and spec.loader is not None
    check_image = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_image)
    (entrypoint,) = words("serve", "ENTRYPOINT")
    assert check_image.name_role(json.loads(entrypoint)) == "supervisor"
    source = inspect.getsource(serve.torchserve.supervisor.Service._start_gateway)
    started = re.search(r"\[sys\.executable, (.+)\]", source)
    assert started is not None
    assert check_image.name_role(["python", *json.loads(f"[{started[1]}]")]) == "gateway"


@pytest.mark.parametrize("stage", ["serve", "gateway"])
def test_image_has_sigterm_healthcheck_and_unprivileged_user(stage: str) -> None:
    assert words(stage, "STOPSIGNAL") == ["SIGTERM"]
    assert words(stage, "USER") == ["1000:1000"]
    (check,) = words(stage, "HEALTHCHECK")
    assert "docker/healthcheck.py" in check
    last = [name for name, _ in stages()[stage]]
    assert last.index("USER") > max(i for i, name in enumerate(last) if name in ("RUN", "COPY"))


@pytest.mark.parametrize("stage", ["serve", "gateway"])
def test_variables_of_an_image_are_settings_that_can_be(stage: str) -> None:
    ours = {name: value for name, value in variables(stage).items() if name.startswith(PREFIX)}
    options = GatewayOptions.build({}, ours)
    assert stage == "serve" or options.host == "0.0.0.0"
    # Nothing is written but below the one folder that is a tmpfs.
    assert variables(stage)["HOME"] == "/tmp"
    assert Settings.from_environment(ours).cache_dir.is_relative_to("/tmp")


def test_the_ports_are_those_of_the_code() -> None:
    default = TorchServeOptions(Path("store"))
    theirs = [default.inference_port, default.management_port, default.metrics_port]
    assert words("serve", "EXPOSE") == [" ".join(map(str, [GatewayOptions().port, *theirs]))]
    assert words("gateway", "EXPOSE") == [str(GatewayOptions().port)]


def test_the_model_store_is_where_the_command_looks() -> None:
    made = " ".join(words("serve", "RUN"))
    assert f"mkdir -p {CONTAINER_STORE} " in made


def test_nothing_is_installed_but_locked_wheels() -> None:
    for stage in stages():
        for run in words(stage, "RUN"):
            assert "apt" not in run.split() and "curl" not in run
            for install in re.findall(r"pip install[^&]*", run):
                from_index = "--no-index" not in install
                assert "--no-deps" in install
                assert not from_index or ("--require-hashes" in install and "--only-binary=:all:" in install)


# What a stage runs to make the environment.
SETUP = (
    "tools/__init__.py",
    "tools/setup_env.py",
    *(f"tools/environment/{name}.py" for name in ("__init__", "packages", "torch_build", "venv")),
)


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """What an engine has of the folder of the Dockerfile: what is not ignored."""
    lines = (CONTEXT / ".dockerignore").read_text().splitlines()
    ignored, *passed = [line for line in lines if not line.startswith("#")]
    assert ignored == "*" and all(line.startswith("!") for line in passed)
    for pattern in (line[1:] for line in passed if not line.endswith(".whl")):
        for path in CONTEXT.glob(pattern):
            shutil.copy(path, tmp_path)
    assert any(fnmatch("mmdet3d_serve-0.2.0-py3-none-any.whl", line[1:]) for line in passed)
    return tmp_path


def unpack(context: Path) -> subprocess.CompletedProcess[str]:
    """Run the first stage in its folder."""
    assert words("wheel", "COPY") == [". ./"]
    (run,) = words("wheel", "RUN")
    return subprocess.run(["sh", "-c", run], cwd=context, capture_output=True, text=True, check=False)


def test_all_that_a_stage_copies_or_runs_is_in_the_folder_or_in_the_wheel(context: Path, wheel: Path) -> None:
    shutil.copy(wheel, context)
    ran = unpack(context)
    assert ran.returncode == 0, ran.stderr
    known = {stage: words(stage, "WORKDIR")[0] for stage in stages() if words(stage, "WORKDIR")}
    for stage in stages():
        for rest in words(stage, "COPY"):
            if copied := re.match(r"--from=([\w-]+) (.+) \S+$", rest):
                assert copied[1] in known
                sources = [path for path in copied[2].split() if path.startswith("/wheel/")]
                assert sources or copied[1] != "wheel"
                for path in sources:
                    assert (context / path.removeprefix("/wheel/")).exists(), path
        for run in words(stage, "RUN"):
            for path in re.findall(r"(?<![=\w])/wheel/\S+", run):
                assert list(context.glob(path.removeprefix("/wheel/"))), path
            for name in re.findall(r"requirements/[\w-]+\.lock", run):
                assert (context / "share" / name).is_file(), name
    for name in re.findall(r"requirements/[\w-]+\.lock", DOCKERFILE.read_text()):
        assert (context / "share" / name).read_bytes() == (ROOT / name).read_bytes()
    for name in SETUP:
        assert (context / "share" / name).read_bytes() == (ROOT / name).read_bytes()
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "share/tools/setup_env.py", "--help"],
        cwd=context, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0 and "--project-only" in ran.stdout, ran.stderr


@pytest.mark.parametrize("count", [0, 2])
def test_build_fails_with_one_sentence_unless_there_is_one_wheel(
    context: Path, wheel: Path, count: int
) -> None:
    for i in range(count):
        shutil.copy(wheel, context / wheel.name.replace("-py3", f"+{i}-py3"))
    ran = unpack(context)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: ") and "make wheel" in ran.stderr and ran.stderr.count("\n") == 1


def test_wheel_holds_neither_tools_nor_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    tops = {name.split("/")[0] for name in names}
    stem = "-".join(wheel.name.split("-")[:2])
    assert tops == {
        "serve", "handlers", "mmdet3d_serve_autoload.py", "mmdet3d_serve_autoload.pth",
        f"{stem}.data", f"{stem}.dist-info",
    }  # fmt: skip
    shared = {name.partition("share/mmdet3d-serve/")[2] for name in names if ".data/" in name}
    assert {name for name in shared if not name.endswith(".lock")} == {"pyproject.toml", *SETUP}


@pytest.mark.parametrize("stage", ["serve", "gateway"])
def test_images_hold_environment_wheel_and_health_check_only(stage: str) -> None:
    copied = [rest.split()[-2] for rest in words(stage, "COPY")]
    assert [path for path in copied if path.startswith("/wheel")] == ["/wheel/healthcheck.py"]
    assert all(
        path.startswith(("/wheel", "/opt/mmdet3d-serve/.venv", "/opt/mmdet3d-serve/sbom")) for path in copied
    )
    (run,) = words(stage, "RUN")
    assert "/wheel/mmdet3d_serve-*.whl" in run


def test_stages_build_on_the_base_that_is_given_and_that_is_pinned() -> None:
    assert all(words(stage, "FROM") == [f"${{BASE_IMAGE}} AS {stage}"] for stage in stages() if stage)
    (base,) = [rest for rest in words("", "ARG") if rest.startswith("BASE_IMAGE=")]
    assert re.fullmatch(r"BASE_IMAGE=python:3\.\d+\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", base)


def test_every_lock_of_the_images_is_pinned_and_hashed() -> None:
    for name in ("gateway", "image", "sbom", "torch-cuda", "torch-cpu"):
        text = (ROOT / "requirements" / f"{name}.lock").read_text()
        blocks = [block for block in re.split(r"\n(?=[a-z0-9])", text) if re.match(r"[a-z0-9]", block)]
        assert blocks or name == "torch-cpu"
        for block in re.findall(r"^[a-z0-9][^\n]*(?:\n    [^\n]*)*", text, re.MULTILINE):
            assert re.match(r"[a-z0-9.-]+==\S+", block) and "--hash=sha256:" in block, block


def test_the_gateway_has_a_part_of_what_the_service_has_in_the_same_versions() -> None:
    def pins(name: str) -> set[str]:
        text = (ROOT / "requirements" / f"{name}.lock").read_text()
        return set(re.findall(r"^[a-z0-9.-]+==\S+", text, re.MULTILINE))

    assert pins("gateway") < pins("runtime")
    assert not any(pin.startswith("torch") for pin in pins("gateway"))
    shared = {pin.split("==")[0] for pin in pins("torch-cuda")} & {
        pin.split("==")[0] for pin in pins("runtime")
    }
    assert {pin for pin in pins("torch-cuda") if pin.split("==")[0] in shared} <= pins("runtime")


# Ends with the name of whatever the gateway's image would lack.
ONLY_LOCKED = """
import importlib.abc, importlib.metadata, re, sys
from pathlib import Path
locked = set(re.findall(r"^([a-z0-9.-]+)==", Path("requirements/gateway.lock").read_text(), re.M))
name = lambda text: re.sub(r"[-_.]+", "-", text).lower()
owners = importlib.metadata.packages_distributions()
class OnlyLocked(importlib.abc.MetaPathFinder):
    def find_spec(self, module, path=None, target=None):
        owned = {name(each) for each in owners.get(module.partition(".")[0], ())} - {"mmdet3d-serve"}
        if owned and not owned & locked:
            raise ModuleNotFoundError(f"{module} is not in gateway.lock", name=module)
sys.meta_path.insert(0, OnlyLocked())
try:
    import torch
except ModuleNotFoundError:
    print("without torch")
import serve.__main__, serve.cli.gateway, serve.cli.fetch, serve.gateway.options, serve.gateway.app
serve.gateway.app.create_app(serve.gateway.options.GatewayOptions())
import boto3, lmdb, uvloop, httptools, orjson, ormsgpack, multipart
print("made")
"""


def test_gateway_imports_only_packages_of_its_lock() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", ONLY_LOCKED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.stdout.split("\n")[:2] == ["without torch", "made"], ran.stderr[-1500:]


# The health check


@pytest.fixture
def answering() -> Iterator[tuple[int, list[int]]]:
    """A server that answers /health/ready with the last number of the list."""
    statuses = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses[-1] if self.path == "/health/ready" else 404)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port, statuses
    server.shutdown()
    thread.join()
    server.server_close()


def check(port: int) -> int:
    environment = {"MMDET3D_SERVE_GATEWAY_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
    command = [sys.executable, "-I", "-S", str(CONTEXT / "healthcheck.py")]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


def test_health_check_follows_readiness(answering: tuple[int, list[int]]) -> None:
    port, statuses = answering
    assert check(port) == 0
    statuses.append(503)
    assert check(port) == 1


def test_health_check_fails_without_a_listener() -> None:
    assert check(pick_free_ports(1)[0]) == 1


def test_no_file_here_holds_a_secret_or_reaches_for_one() -> None:
    files = [
        path
        for folder in ("docker", "k8s")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".whl")
    ]
    assert len(files) > 20
    for path in files:
        assert not re.search(r"(?i)(password|secret_key|token)\s*[:=]\s*['\"]?\w{8,}", path.read_text()), path
        assert os.fspath(path.relative_to(ROOT)) != ".env"
