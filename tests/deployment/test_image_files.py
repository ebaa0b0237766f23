"""Dockerfile, compose files, alerts and dashboard: about the service that there is, and closed where they should be."""

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
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from check_jsonschema import builtin_schemas
from prometheus_client.parser import text_string_to_metric_families

import serve.torchserve.supervisor
from serve.cli.main import COMMANDS
from serve.cli.serve import CONTAINER_STORE
from serve.compare.changes import Change
from serve.gateway.admission import Admission
from serve.gateway.batcher import BatchReport
from serve.gateway.metrics import DEPRECATED_NAMES, Metrics
from serve.gateway.models import ModelVersion
from serve.gateway.options import GatewayOptions
from serve.gateway.rollout import Rollout
from serve.gateway.shadow_metrics import ShadowMetrics
from serve.gateway.tracks import TrackSessions
from serve.gateway.watching import Watching, WatchOptions
from serve.settings import PREFIX, Settings
from serve.torchserve import TorchServeOptions
from serve.torchserve.management import ModelState
from serve.torchserve.process import DRAIN_S
from serve.watch.observation import ObservedFrame, count_frames
from serve.watch.reference import Reference, reference_of
from serve.watch.statistics import SEGMENT, Layout
from tests.conftest import pick_free_ports
from tests.deployment.conftest import ROOT

DOCKER = ROOT / "docker"
CONTEXT = DOCKER / "serve"
DOCKERFILE = CONTEXT / "Dockerfile"
# What NVIDIA's exporter exports by default; TorchServe is told to collect no figures of GPUs.
DCGM = {"DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_FB_USED"}
PROMQL = {
    "absent", "and", "by", "group_left", "histogram_quantile", "ignoring", "increase", "label_values", "le", "max",
    "rate", "sum",
}  # fmt: skip

Instruction = tuple[str, str]


def instructions(path: Path) -> list[Instruction]:
    """Of a Dockerfile: each instruction with its words, lines joined, comments gone."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (name, rest)
        for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def stages() -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {"": []}
    current = ""
    for name, rest in instructions(DOCKERFILE):
        if name == "FROM":
            current = rest.split(" AS ")[1]
            found[current] = []
        found[current].append((name, rest))
    return found


def words(stage: str, name: str) -> list[str]:
    return [rest for each, rest in stages()[stage] if each == name]


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
    assert (context / "share/tools/setup_env.py").read_bytes() == (ROOT / "tools/setup_env.py").read_bytes()


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
    assert {name for name in shared if not name.endswith(".lock")} == {"pyproject.toml", "tools/setup_env.py"}


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


# Compose


def compose(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return found


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_follow_the_compose_specification(name: str) -> None:
    jsonschema.validate(compose(name), builtin_schemas.get_builtin_schema("vendor.compose-spec"))


def test_compose_builds_and_names_what_there_is() -> None:
    service = compose("compose.yaml")["services"]["serve"]
    assert service["build"]["target"] in stages()
    assert (DOCKER / service["build"]["context"] / service["build"].get("dockerfile", "Dockerfile")).is_file()
    known = {rest.partition("=")[0] for stage in stages() for rest in words(stage, "ARG")}
    assert service["build"]["args"].keys() <= known
    settings = {
        name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for name, value in service["environment"].items()
    }
    Settings.from_environment(settings)
    for each in compose("compose.yaml")["services"].values():
        for volume in each["volumes"]:
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            assert not source.startswith("./") or (DOCKER / source).exists(), source


def test_compose_is_as_closed_as_the_cluster() -> None:
    services = compose("compose.yaml")["services"]
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert name == "serve" or re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    assert services["serve"]["read_only"] and services["serve"]["tmpfs"]
    assert services["serve"]["ports"] == [f"127.0.0.1:{GatewayOptions().port}:{GatewayOptions().port}"]


def test_compose_waits_until_everything_in_flight_is_answered() -> None:
    default = GatewayOptions()
    grace = int(compose("compose.yaml")["services"]["serve"]["stop_grace_period"].removesuffix("s"))
    assert (
        default.shutdown_delay_s
        + default.graceful_timeout_s
        + serve.torchserve.supervisor._EXIT_S
        + DRAIN_S
        + 10
        < grace
    )


def test_prometheus_scrapes_ports_that_there_are() -> None:
    jobs = compose("prometheus/prometheus.yaml")["scrape_configs"]
    targets = [target for job in jobs for each in job.get("static_configs", []) for target in each["targets"]]
    ports = (GatewayOptions().port, TorchServeOptions(Path("store")).metrics_port)
    assert targets == [f"serve:{port}" for port in ports]


# Metrics


def watched() -> Watching:
    """Metrics of a model of clouds and one of images, whose window is compared with its reference."""
    image = {
        "bboxes": np.array([[0, 0, 9, 9]]), "scores": np.array([0.9]), "labels": np.array([0]), "classes": ["Car"],
    }  # fmt: skip
    cloud = {
        **{f"{name}_3d": image[name] for name in ("scores", "labels")},
        "bboxes_3d": np.ones((1, 7)), "box_type_3d": "LiDAR", "classes": ["Car"],
    }  # fmt: skip
    layout = Layout.of_classes(["Car"])
    counts = count_frames([ObservedFrame(cloud, 5, 0.5, ("no_intensity",))], layout)
    counts.add(count_frames([ObservedFrame(image)], layout))
    counts.of(SEGMENT)[0] = 5
    reference = reference_of([counts], 0.3, 1).document()
    spec = {"classes": ["Car"], Reference.KEY: reference}
    model = ModelVersion(ModelState("m", "1.0", True, (), 0), spec=spec)
    watching = Watching(lambda name, version: model, WatchOptions(window_frames=1))
    watching.observe("m", "1.0", counts.document())
    return watching


@cache
def of_the_gateway() -> Mapping[str, set[str]]:
    """Labels of the gateway's samples by name, without deprecated ones."""
    metrics = Metrics(Admission(1, 1), lambda model: True, TrackSessions(GatewayOptions()))
    metrics.observe_request("m", 200, 0.1)
    metrics.observe_batch("m", BatchReport(items=1, cost=1, queue_s=(0.0,), run_s=0.1, failed=True))
    metrics.set_ready(True)
    metrics.observe_sample("m", "kept")
    metrics.texts.append(watched().exposition)
    metrics.observe_fallback("m", "2.0", "not_ready")
    metrics.observe_version("m", "1.0", 200, 0.1)
    metrics.show_rollout(Rollout(file=Path("rollout")))
    shadow, pair = ShadowMetrics(metrics.registry), ("m", "1.0", "2.0")
    for range_m in (None, 9.0):  # of an image, of a cloud
        shadow.observe_changes(pair, [Change("matched", "Car", "Car", 0.9, 0.0, False, 0.0, range_m, (0, 0))])
    shadow.observe_failure(pair, "not_ready")
    shadow.observe_drop(pair, "busy")
    parsed = text_string_to_metric_families(metrics.exposition().decode())
    current = (family for family in parsed if family.name not in DEPRECATED_NAMES)
    return {sample.name: {*sample.labels} for family in current for sample in family.samples}


@cache
def exported() -> set[str]:
    """Names of all metrics of the gateway, TorchServe and NVIDIA's exporter."""
    torchserve = importlib.util.find_spec("ts")
    assert torchserve is not None and torchserve.origin is not None
    theirs = yaml.safe_load((Path(torchserve.origin).parent / "configs" / "metrics.yaml").read_text())[
        "ts_metrics"
    ]
    return {*of_the_gateway()} | {one["name"] for kind in theirs.values() for one in kind} | DCGM


def names_in(expression: str) -> set[str]:
    """The metrics that an expression names: its words, without strings, labels, durations and PromQL's own."""
    bare = re.sub(
        r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', " ", re.sub(r"\b(by|without|ignoring)\s*\([^)]*\)", " ", expression)
    )
    return {word for word in re.findall(r"[A-Za-z_]\w*", bare) if word not in PROMQL}


def labels_in(expression: str) -> set[str]:
    """The labels that an expression names, in selectors and in groups."""
    selected = re.findall(r"([A-Za-z_]\w*)\s*(?:=~|!~|!=|=)\s*\"", expression)
    groups = re.findall(r"\b(?:by|without|ignoring)\s*\(([^)]*)\)", expression)
    return {*selected, *(label.strip() for group in groups for label in group.split(","))}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCKER / "grafana" / "dashboards" / "mmdet3d-serve.json").read_text())
    return found


def expressions() -> Iterator[tuple[str, str]]:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for group in yaml.safe_load((DOCKER / "prometheus" / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    autoscaler = ROOT / "k8s" / "components" / "autoscale-on-pending" / "horizontalpodautoscaler.yaml"
    for metric in yaml.safe_load(autoscaler.read_text())["spec"]["metrics"]:
        yield "autoscaler", metric["pods"]["metric"]["name"]


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_every_expression_is_about_metrics_that_there_are(title: str, expression: str) -> None:
    names = names_in(expression)
    assert names and names <= exported()


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_every_expression_is_about_labels_that_its_metrics_have(title: str, expression: str) -> None:
    ours = [of_the_gateway()[name] for name in names_in(expression) if name in of_the_gateway()]
    if ours:  # TorchServe lists no labels
        assert labels_in(expression) <= set().union(*ours)


def test_the_dashboard_shows_all_that_is_counted_of_shadows_and_canaries() -> None:
    shown = {
        re.sub("_(bucket|sum|count)$", "", name)
        for panel in dashboard()["panels"]
        for target in panel["targets"]
        for name in names_in(target["expr"])
    }
    counted = {
        re.sub("_(bucket|sum|count)$", "", name)
        for name in of_the_gateway()
        if re.match("mmdet3d_serve_(shadow|canary|version|rollout)_", name) and not name.endswith("_created")
    }
    assert len(counted) >= 12 and counted <= shown


def test_the_dashboard_shows_queue_batches_latency_outcomes_and_gpus() -> None:
    shown = {name for _, expression in expressions() for name in names_in(expression)}
    assert {
        "mmdet3d_serve_queue_duration_seconds_bucket", "mmdet3d_serve_request_duration_seconds_bucket",
        "mmdet3d_serve_batch_frames_bucket", "mmdet3d_serve_batch_cost_bucket", "mmdet3d_serve_requests_total",
        "mmdet3d_serve_pending_ratio", "mmdet3d_serve_ready", "ts_queue_latency_microseconds", *DCGM,
    } <= shown  # fmt: skip


def test_the_dashboard_is_well_formed_and_finds_its_data() -> None:
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    (uid,) = [one["uid"] for one in source["datasources"]]
    panels = dashboard()["panels"]
    assert all(panel["datasource"]["uid"] == uid for panel in panels)
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


def test_the_cluster_alerts_on_the_same() -> None:
    rule = yaml.safe_load((ROOT / "k8s/components/servicemonitor/prometheusrule.yaml").read_text())
    assert rule["spec"] == yaml.safe_load((DOCKER / "prometheus/alerts.yaml").read_text())


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
