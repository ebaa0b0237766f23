"""A rollout over a real TorchServe: what an altered version changes is caught before it answers anything.

Version 2.0 of the model is altered, version 3.0 is a copy of the first. The short form has a handler without a model,
the long one the demo SECOND.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.cli import compare, reference
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from serve.watch.statistics import CLASS, STATISTICS
from tests.conftest import DEMO_CHECKPOINT, DEMO_CONFIG, pick_free_ports, write_archive
from tests.deployment.test_alert_rules import check_alert
from tests.gateway.conftest import RunningGateway, running_gateway
from tests.gateway.running import Background, eventually
from tests.gateway.test_canary import sample, sample_in

pytestmark = [pytest.mark.torchserve, pytest.mark.timeout(600)]

FRAMES = 16
WATCHED_FRAMES = 40


@pytest.fixture(scope="module")
def background() -> Iterator[Background]:
    made = Background()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    store = tmp_path_factory.mktemp("store")
    for version in ("1.0", "2.0", "3.0"):
        write_archive(store / f"boxes-{version}.mar", "tests.e2e.boxes_handler", "boxes", version)
    with serving(store) as running:
        yield running


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from serve.synthetic.scenes import generate_scene, held_out_seed

    folder = tmp_path_factory.mktemp("scenes") / "clouds"
    return write_clouds(folder, lambda k: generate_scene(held_out_seed(k)).to_bytes(), WATCHED_FRAMES)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, demo_mar: Path, scenes: Path) -> Iterator[TorchServe]:
    """The demo SECOND, as version 2.0 one that hardly finds pedestrians; all with the reference of the first."""
    import torch

    from serve.convert import Conversion, convert

    folder = tmp_path_factory.mktemp("versions")
    checkpoint = torch.load(DEMO_CHECKPOINT, weights_only=True)
    checkpoint["state_dict"]["bbox_head.conv_cls.bias"].view(-1, 3)[:, 0] -= 3.0
    torch.save(checkpoint, folder / "altered.pth")
    store = tmp_path_factory.mktemp("store")
    first = shutil.copy(demo_mar, store / "second-1.0.mar")
    window = str(WATCHED_FRAMES // 2)
    assert reference.main([str(first), str(scenes), "--window-frames", window, "--device", "cpu"]) == 0
    for version, weights in (("2.0", folder / "altered.pth"), ("3.0", DEMO_CHECKPOINT)):
        made = convert(Conversion(DEMO_CONFIG, weights, folder, "second", model_version=version))
        path = shutil.move(made.path, store / f"second-{version}.mar")
        assert reference.main([str(path), "--from", str(first)]) == 0
    with serving(store) as running:
        yield running


def serving(store: Path) -> TorchServe:
    ports: dict[str, Any] = dict(
        zip(("inference_port", "management_port", "metrics_port"), pick_free_ports(3), strict=True)
    )
    models = [ServedModel(path.name) for path in sorted(store.glob("*.mar"))]
    return TorchServe(TorchServeOptions(store, models, system_metrics=False, gpus=0, **ports))


def run_compare(*arguments: object) -> tuple[int, dict[str, Any]]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = compare.main([str(each) for each in arguments])
    found: dict[str, Any] = json.loads(printed.getvalue().splitlines()[-1])["compare"]
    return code, found


def start(background: Background, server: TorchServe, **options: Any) -> Any:
    urls = {"inference_url": server.inference_url, "management_url": server.management_url}
    return running_gateway(background, **urls, worker_sockets=server.worker_sockets, **options)


def kill_workers(server: TorchServe, version: str) -> int:
    """Kill the workers of a version of the model of boxes; returns how many there were."""
    count = 0
    for worker in server.workers("boxes", version):
        if worker.ready and worker.pid:
            with contextlib.suppress(ProcessLookupError):  # TorchServe has not noticed an earlier death yet
                os.kill(worker.pid, signal.SIGKILL)
                count += 1
    return count


def all_ready(gateway: RunningGateway) -> bool:
    return [each["status"] for each in gateway.client.get("/models").json()] == ["ready"] * 3


@dataclass(frozen=True)
class Trial:
    """What was seen of a model whose version 1.0 answers, with shadows 2.0 and 3.0.

    Attributes:
        model: its name.
        before: metrics before the first frame.
        after: metrics after the last one.
        compared: exit status and figures of `compare`, by shadow.
    """

    model: str
    before: str
    after: str
    compared: Mapping[str, tuple[int, dict[str, Any]]]

    def counted(self, shadow: str, change: str, **labels: str) -> float:
        """Detections of a shadow, by what became of them."""
        return sample_in(self.after, "shadow_detections_total", shadow=shadow, change=change, **labels)

    def drifted(self, version: str) -> set[str]:
        """Statistics of a version that left its reference."""
        distance, limit = (
            partial(sample_in, self.after, f"drift_{name}", version=version) for name in ("distance", "limit")
        )
        return {name for name in (*STATISTICS, CLASS) if distance(statistic=name) > limit(statistic=name)}

    def series(self) -> list[dict[str, str]]:
        """What is counted of shadows and of drift, as scraped once a minute for an hour, for promtool."""
        values = {}
        for minutes, exposition in ((2, self.before), (70, self.after)):
            for family in text_string_to_metric_families(exposition):
                if family.name.startswith(("mmdet3d_serve_shadow_", "mmdet3d_serve_drift_")):
                    for each in family.samples:
                        labels = {**each.labels, "gateway": "0", "instance": "a:8000"}.items()
                        name = (
                            f"{each.name}{{{', '.join(f'{key}={json.dumps(text)}' for key, text in labels)}}}"
                        )
                        held = values.setdefault(name, [] if minutes == 2 else ["_x1"])
                        held.append(f"{each.value}x{minutes - 1}")
        return [{"series": name, "values": " ".join(each)} for name, each in values.items()]


def observe(background: Background, server: TorchServe, name: str, clouds: Path) -> Trial:
    """Send every frame to version 1.0, with both others as shadows, then compare the versions."""
    bodies = [path.read_bytes() for path in sorted(clouds.iterdir())]
    shadows = {"shadow": f"{name}:2.0=1,{name}:3.0=1", "shadow_frames": 64, "shadow_wait_s": 60}
    with start(background, server, **shadows, watch_window_frames=len(bodies) // 2) as gateway:
        eventually(lambda: all_ready(gateway), 60)
        gateway.client.timeout = 60
        before = gateway.client.get("/metrics").text
        for body in bodies:
            assert gateway.post(f"/predictions/{name}", content=body).headers["x-model-version"] == "1.0"
        eventually(lambda: sample(gateway, "shadow_frames_total") == 2 * len(bodies), 60)
        after = gateway.client.get("/metrics").text
    with start(background, server) as gateway:
        eventually(lambda: all_ready(gateway), 60)
        address = f"{gateway.url}/predictions/{name}"
        compared = {
            shadow: run_compare(f"{address}/1.0", f"{address}/{shadow}", clouds) for shadow in ("2.0", "3.0")
        }
    return Trial(name, before, after, compared)


def check_trial(trial: Trial) -> None:
    """The altered version is caught by compare, with the same figures by the shadow; a copy differs in nothing."""
    for shadow, code in (("2.0", 1), ("3.0", 0)):
        status, found = trial.compared[shadow]
        assert status == code, found
        for kind in ("matched", "renamed", "lost", "new"):
            assert found["all"][kind] == trial.counted(shadow, kind), (shadow, kind)
        assert bool(found["all"]["lost"]) == (shadow == "2.0")
    lost = trial.compared["2.0"][1]["by_class"]["Pedestrian"]["lost"]
    assert lost == trial.counted("2.0", "lost", **{"class": "Pedestrian"}) > 0
    assert not trial.drifted("1.0") and not trial.drifted("3.0")


def check_alerts(folder: Path, trial: Trial, differing: Sequence[str]) -> None:
    """The rules fire on what the gateway exported for the altered version, for these classes, and for no other."""
    model = {"model": trial.model}
    expected = {
        "ShadowDiffers": [{**model, "shadow": "2.0", "class": name} for name in differing],
        "Drift": [{**model, "version": "2.0", "statistic": each} for each in trial.drifted("2.0")],
        "ShadowFails": [],
    }
    for alert, firing in expected.items():
        check_alert(folder, f"Mmdet3dServe{alert}", trial.series(), 60, firing)


def write_clouds(folder: Path, make: Callable[[int], bytes], count: int = FRAMES) -> Path:
    folder.mkdir()
    for k in range(count):
        (folder / f"{k:06d}.bin").write_bytes(make(k))
    return folder


def random_cloud(number: int) -> bytes:
    dice = np.random.default_rng(number)
    return dice.uniform((0, -40, -2, 0), (70, 40, 1, 1), (1024, 4)).astype(np.float32).tobytes()


@pytest.fixture(scope="module")
def trial_of_boxes(
    background: Background, boxes: TorchServe, tmp_path_factory: pytest.TempPathFactory
) -> Trial:
    clouds = write_clouds(tmp_path_factory.mktemp("boxes") / "clouds", random_cloud)
    return observe(background, boxes, "boxes", clouds)


@pytest.fixture(scope="module")
def trial_of_second(background: Background, second: TorchServe, scenes: Path) -> Trial:
    return observe(background, second, "second", scenes)


def test_an_altered_version_is_caught_by_compare_and_by_its_shadow(trial_of_boxes: Trial) -> None:
    check_trial(trial_of_boxes)


def test_the_alert_fires_on_the_metrics_of_an_altered_versions_shadow(
    trial_of_boxes: Trial, tmp_path: Path
) -> None:
    # It lacks all pedestrians, and adds a car to every eight.
    check_alerts(tmp_path, trial_of_boxes, ["Pedestrian", "Car"])


@pytest.mark.soak
def test_requests_are_answered_while_the_shadows_worker_is_killed(
    background: Background, boxes: TorchServe
) -> None:
    slowest = {"quiet": 0.0, "killed": 0.0}
    with start(background, boxes, shadow="boxes:2.0=1") as gateway:
        eventually(lambda: all_ready(gateway), 60)
        killed = 0
        for k in range(120):
            if k in (40, 80):
                killed += kill_workers(boxes, "2.0")
            began = time.perf_counter()
            assert gateway.post("/predictions/boxes", content=random_cloud(k)).status_code == 200
            phase = "quiet" if k < 40 else "killed"
            slowest[phase] = max(slowest[phase], time.perf_counter() - began)
        assert killed and gateway.client.get("/health/ready").status_code == 200
        assert sample(gateway, "requests_total", model="boxes", status="200") == 120
        assert sample(gateway, "shadow_frames_total", shadow="2.0")
    # A request that waited for anything of the shadow's would wait for its worker, which takes seconds to start.
    assert slowest["killed"] < 1.0, slowest
    print(slowest)


@pytest.mark.soak
def test_a_canary_whose_workers_are_killed_loses_no_request(
    background: Background, boxes: TorchServe
) -> None:
    eventually(lambda: all(worker.ready for worker in boxes.workers("boxes", "3.0")), 60)
    with start(background, boxes, canary="boxes:3.0=0.5") as gateway:
        eventually(lambda: all_ready(gateway), 60)
        versions: list[str] = []
        stop = threading.Event()

        def kill() -> None:
            while not stop.wait(0.3):
                kill_workers(boxes, "3.0")

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            for k in range(100):
                answer = gateway.post("/predictions/boxes", content=random_cloud(k))
                assert answer.status_code == 200, answer.text
                versions.append(answer.headers["x-model-version"])
        finally:
            stop.set()
            killer.join()
        assert {*versions} == {"1.0", "3.0"} and versions.count("1.0") > 50
        assert sample(gateway, "canary_fallbacks_total", model="boxes", version="3.0")


@pytest.mark.soak
@pytest.mark.slow
def test_an_altered_second_is_caught_by_compare_by_its_shadow_and_by_its_drift(
    trial_of_second: Trial,
) -> None:
    check_trial(trial_of_second)
    left = trial_of_second.drifted("2.0")
    print("left the reference:", left)
    assert "class" in left


@pytest.mark.soak
@pytest.mark.slow
def test_alerts_fire_on_the_metrics_of_an_altered_seconds_shadow(
    trial_of_second: Trial, tmp_path: Path
) -> None:
    check_alerts(tmp_path, trial_of_second, ["Pedestrian"])
