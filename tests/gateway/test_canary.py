"""Canaries: the share that they get, and that they cost no request."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.errors import SettingsError
from serve.gateway.options import GatewayOptions
from serve.gateway.rollout import EvenChoice, Rollout, parse_shares
from tests.gateway.conftest import RunningGateway
from tests.gateway.fake_torchserve import IMAGES, FakeModel, FakeTorchServe
from tests.gateway.running import Background, eventually

Start = Callable[..., RunningGateway]
Cloud = Callable[[int], bytes]


@pytest.fixture
def canary(torchserve: FakeTorchServe) -> FakeModel:
    made = torchserve.models["second"]["2.0"] = FakeModel(
        workers=[4712], default=False, alter=lambda answer: {**answer, "altered": True}
    )
    return made


def version_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-model-version"]


def ready(gateway: RunningGateway) -> RunningGateway:
    """The gateway, once it knows both versions."""
    eventually(lambda: [each["status"] for each in gateway.client.get("/models").json()] == ["ready"] * 2)
    return gateway


def sample(gateway: RunningGateway, name: str, **labels: str) -> float:
    """Sum of the samples of a metric that have these labels."""
    return sample_in(gateway.client.get("/metrics").text, name, **labels)


def sample_in(exposition: str, name: str, **labels: str) -> float:
    """As `sample`, of what was read before."""
    return sum(
        each.value
        for family in text_string_to_metric_families(exposition)
        for each in family.samples
        if each.name == f"mmdet3d_serve_{name}" and labels.items() <= each.labels.items()
    )


def test_a_canary_answers_its_share_and_each_answer_names_its_version(
    start_gateway: Start, canary: FakeModel, cloud: Cloud
) -> None:
    gateway = ready(start_gateway(canary="second:2.0=0.25"))
    answers = [gateway.post(content=cloud(k)) for k in range(40)]
    counts = Counter(map(version_of, answers))
    assert 9 <= counts["2.0"] <= 11 and counts.keys() == {"1.0", "2.0"}
    assert all(("altered" in each.json()) == (version_of(each) == "2.0") for each in answers)
    assert version_of(gateway.post("/predictions/second/1.0", content=cloud(1))) == "1.0"
    for version, count in counts.items():
        expected = count + (version == "1.0")
        assert sample(gateway, "version_requests_total", version=version, status="200") == expected
        assert sample(gateway, "version_request_duration_seconds_count", version=version) == expected
    shares = {each["version"]: each.get("canary_share") for each in gateway.client.get("/models").json()}
    assert shares == {"1.0": None, "2.0": 0.25}


def test_the_same_requests_are_divided_in_the_same_way(
    start_gateway: Start, canary: FakeModel, cloud: Cloud
) -> None:
    orders = [
        [version_of(gateway.post(content=cloud(1))) for _ in range(8)]
        for gateway in [ready(start_gateway(canary="second:2.0=0.5")) for _ in range(2)]
    ]
    assert orders[0] == orders[1] and {*orders[0]} == {"1.0", "2.0"}


@pytest.mark.parametrize("trouble", ["worker died", "garbage", "queue full"])
def test_what_a_canary_fails_on_the_default_version_answers(
    start_gateway: Start, torchserve: FakeTorchServe, canary: FakeModel, cloud: Cloud, trouble: str
) -> None:
    gateway = ready(start_gateway(canary="second:2.0=1"))
    assert version_of(gateway.post(content=cloud(1))) == "2.0"
    canary.trouble = trouble
    assert version_of(gateway.post(content=cloud(1))) == "1.0"
    many = gateway.post(files=[("data", cloud(k)) for k in range(3)])
    assert version_of(many) == "1.0" and all("frame" in each for each in many.json())
    lines = gateway.post(
        files=[("data", cloud(k)) for k in range(3)], headers={"accept": "application/x-ndjson"}
    )
    assert lines.text.count('"status":200') == 3


def test_a_canary_without_workers_is_passed_over(
    start_gateway: Start, canary: FakeModel, cloud: Cloud
) -> None:
    gateway = ready(start_gateway(canary="second:2.0=1"))
    assert version_of(gateway.post(content=cloud(1))) == "2.0"
    canary.ready, canary.trouble = 0, "queue full"
    eventually(
        lambda: (
            version_of(gateway.post(content=cloud(1))) == "1.0"
            and sample(gateway, "canary_fallbacks_total", version="2.0", reason="not_ready")
        )
    )
    canary.ready, canary.trouble = None, ""
    eventually(lambda: version_of(gateway.post(content=cloud(1))) == "2.0")


def test_metrics_of_a_canary_count_from_0_before_it_fails(start_gateway: Start, canary: FakeModel) -> None:
    gateway = ready(start_gateway(canary="second:2.0=0.1"))
    text = gateway.client.get("/metrics").text
    for reason in ("stalled", "backend_broken"):
        labels = f'model="second",reason="{reason}",version="2.0"'
        assert f"mmdet3d_serve_canary_fallbacks_total{{{labels}}} 0.0" in text


def test_a_frame_that_nothing_can_read_is_not_sent_twice(
    start_gateway: Start, torchserve: FakeTorchServe, canary: FakeModel
) -> None:
    gateway = ready(start_gateway(canary="second:2.0=1"))
    assert gateway.post(content=b"bad!").status_code == 422
    assert len(torchserve.calls) == 1


def test_a_canary_that_hangs_has_half_of_the_deadline(
    start_gateway: Start, background: Background, canary: FakeModel, cloud: Cloud
) -> None:
    gateway = ready(start_gateway(canary="second:2.0=1", timeout_s=2.0))
    canary.gate = background.call(_closed_gate())
    began = asyncio.run_coroutine_threadsafe(_now(), background.loop).result()
    assert version_of(gateway.post(content=cloud(1), params={"timeout_ms": 400})) == "1.0"
    assert background.call(_now()) - began < 2.0
    eventually(
        lambda: (
            version_of(gateway.post(content=cloud(1))) == "1.0"
            and sample(gateway, "canary_fallbacks_total", version="2.0", reason="stalled")
        )
    )
    background.soon(canary.gate.set)


def test_a_canary_that_is_slow_may_still_answer_when_the_default_version_is_too(
    start_gateway: Start, background: Background, torchserve: FakeTorchServe, canary: FakeModel, cloud: Cloud
) -> None:
    gateway = ready(start_gateway(canary="second:2.0=1"))
    default = torchserve.models["second"]["1.0"]
    canary.gate, default.gate = background.call(_closed_gate()), background.call(_closed_gate())
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(gateway.post, content=cloud(1), params={"timeout_ms": 1600})
        eventually(lambda: default.calls == [1])  # after half of the deadline
        background.soon(canary.gate.set)
        assert version_of(answer.result()) == "2.0"
    background.soon(default.gate.set)
    assert sample(gateway, "canary_fallbacks_total") == 0


def test_a_class_that_only_the_default_version_knows_is_no_error(
    start_gateway: Start, torchserve: FakeTorchServe, canary: FakeModel, cloud: Cloud
) -> None:
    gateway = ready(start_gateway(canary="second:2.0=1"))
    assert version_of(gateway.post(content=cloud(1))) == "2.0"
    counts_of_zero = 'canary_fallbacks_total{model="second",reason="unknown_option",version="2.0"} 0.0'
    assert counts_of_zero in gateway.client.get("/metrics").text  # so that an alert sees the first one
    canary.unknown_classes = frozenset({"Car", "Tram"})
    torchserve.models["second"]["1.0"].unknown_classes = frozenset({"Tram"})
    assert version_of(gateway.post(content=cloud(1), params={"classes": "Car"})) == "1.0"
    assert version_of(gateway.post(content=cloud(1), params={"classes": "Pedestrian"})) == "2.0"
    assert sample(gateway, "canary_fallbacks_total", reason="unknown_option") == 1
    refused = gateway.post(content=cloud(1), params={"classes": "Tram"})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "unknown_option"
    assert sample(gateway, "canary_fallbacks_total") == 1


async def _closed_gate() -> asyncio.Event:
    return asyncio.Event()


async def _now() -> float:
    return asyncio.get_running_loop().time()


def test_a_canary_with_other_inputs_or_none_of_that_version_gets_nothing(
    start_gateway: Start, torchserve: FakeTorchServe, canary: FakeModel, cloud: Cloud
) -> None:
    canary.spec = dict(IMAGES)
    gateway = ready(start_gateway(canary="second:2.0=0.5,second:3.0=0.5"))
    eventually(lambda: len(gateway.client.get("/models").json()) == 2)
    assert {version_of(gateway.post(content=cloud(1))) for _ in range(6)} == {"1.0"}
    for version, reason in (("2.0", "other_inputs"), ("3.0", "not_ready")):
        assert sample(gateway, "canary_fallbacks_total", version=version, reason=reason)


def test_a_sequence_stays_with_its_version_whatever_the_shares_become(
    start_gateway: Start, canary: FakeModel, cloud: Cloud, tmp_path: Path
) -> None:
    file = tmp_path / "rollout"
    file.write_text("canary second:2.0=0.5\n")
    gateway = ready(start_gateway(rollout_file=file))
    opened = {
        name: version_of(
            gateway.post(params={"track_session": name, "track_start": "true"}, content=cloud(1))
        )
        for name in map(str, range(8))
    }
    assert {*opened.values()} == {"1.0", "2.0"}
    file.write_text("canary second:2.0=0  # back\n")
    eventually(
        lambda: not any(version_of(gateway.post(content=cloud(1))) == "2.0" for _ in range(8)), timeout_s=15
    )
    for name, version in opened.items():
        assert version_of(gateway.post(params={"track_session": name}, content=cloud(2))) == version


def test_v2_names_the_version_that_answered(start_gateway: Start, canary: FakeModel, cloud: Cloud) -> None:
    gateway = ready(start_gateway(canary="second:2.0=1"))
    body = {
        "inputs": [{"name": "points", "datatype": "FP32", "shape": [16, 4], "data": [0.5] * 64}],
        "outputs": [{"name": "detections"}],
    }
    answer = gateway.post("/v2/models/second/infer", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model_version"] == version_of(answer) == "2.0"
    canary.trouble = "worker died"
    answer = gateway.post("/v2/models/second/infer", json=body)
    assert answer.json()["model_version"] == version_of(answer) == "1.0"


# Shares


def test_a_share_is_even_over_any_stretch_and_for_every_camera_of_a_rig() -> None:
    choice = EvenChoice("second 2.0")
    points = [choice() for _ in range(6000)]
    for share in (0.05, 0.1, 1 / 6, 0.5):
        for start in (0, 1000, 5000):
            chosen = sum(point < share for point in points[start : start + 1000])
            assert abs(chosen - 1000 * share) < 4
        for camera in range(6):
            assert abs(sum(point < share for point in points[camera::6]) - 1000 * share) < 12


@pytest.mark.parametrize(
    "text",
    [
        "second",
        "second=0.1",
        "second:2.0",
        "second:2.0=5",
        "second:2.0=-1",
        "second:2.0=nan",
        "second:2.0=5%",
        "second:2.0=0_1",
        "second:2.0=٠.١",
        ":2=1",
    ],
)
@pytest.mark.parametrize("name", ["canary", "shadow"])
def test_a_wrong_share_is_refused(name: str, text: str) -> None:
    with pytest.raises(SettingsError):
        GatewayOptions.build({name: text}, {})


def test_a_share_of_a_version_that_is_not_registered_is_logged_once(
    start_gateway: Start, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = start_gateway(canary="second:9.9=0.5,secnd:1.0=0.1,second:7=0", shadow="second:1.0=0.5")

    def logged() -> list[str]:
        return [each.getMessage() for each in caplog.records if each.name == "serve.gateway.rollout"]

    for _ in range(2):
        gateway.client.get("/models")
    assert len(logged()) == 1
    named = ("canary second:9.9", "canary secnd:1.0")
    assert all(each in logged()[0] for each in named) and "shadow" not in logged()[0]


def test_canaries_share_the_traffic_and_shadows_do_not() -> None:
    with pytest.raises(SettingsError):
        GatewayOptions.build({"canary": "second:2.0=0.6,second:3.0=0.5"}, {})
    GatewayOptions.build({"shadow": "second:2.0=0.6,second:3.0=0.5"}, {})
    with pytest.raises(SettingsError):
        GatewayOptions.build({"shadow": "second:2.0=0.6,second:2.0=0.5"}, {})
    assert parse_shares(["a:1=0.7", "a:2=0.2", "a:3=0.1"], divided=True)


def test_a_file_replaces_the_options_and_must_be_right_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "rollout"
    with pytest.raises(SettingsError, match=str(file)):
        Rollout.of((), (), file)
    for wrong in ("canary second:2.0=2", "second:2.0=0.1", "canary second:2.0", "\xff"):
        file.write_bytes(wrong.encode("latin-1"))
        with pytest.raises(SettingsError, match=str(file)):
            Rollout.of((), (), file)
    with pytest.raises(SettingsError):
        GatewayOptions.build({"rollout_file": str(file), "shadow": "second:2.0=0.1"}, {})
    file.write_text("# of the week\n\ncanary second:2.0=0.05\nshadow second:3.0=0.5 # nightly\n")
    found = Rollout.of((), (), file)
    assert found.canary == {"second": {"2.0": 0.05}} and found.shadow == {"second": {"3.0": 0.5}}


async def _reload(rollout: Rollout) -> None:
    await rollout.reload()


def test_a_file_that_becomes_wrong_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "rollout"
    file.write_text("canary second:2.0=0.05\n")
    rollout = Rollout.of((), (), file)
    file.write_text("canary second:2.0=2\n")
    asyncio.run(_reload(rollout))
    assert rollout.canary == {"second": {"2.0": 0.05}} and not rollout.is_file_valid
    file.unlink()
    asyncio.run(_reload(rollout))
    assert rollout.canary == {"second": {"2.0": 0.05}} and not rollout.is_file_valid
    file.write_text("canary second:2.0=0.5\n")
    asyncio.run(_reload(rollout))
    assert rollout.canary == {"second": {"2.0": 0.5}} and rollout.is_file_valid
