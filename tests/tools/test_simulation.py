"""The simulation of a service: queueing theory, the serving benchmark, the accounts, the commands."""

from __future__ import annotations

import json

import pytest

from serve.errors import SettingsError
from tools.simulation.commands import check, run, size
from tools.simulation.load import Autoscaling, Burst, Load, simulate
from tools.simulation.service import PodModel

# One frame at a time, nothing else on the way: an M/D/1 queue.
SINGLE = PodModel(0.0, 0.01, batch_frames=1, gateway_s=0.0, transport_s=0.0, max_pending_frames=10**6)


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.8])
def test_waiting_times_are_those_of_queueing_theory(utilisation: float) -> None:
    outcome = simulate(SINGLE, Load(rate=utilisation / SINGLE.frame_s, seconds=1000))
    # Pollaczek and Khinchine, for constant service: rho / 2 (1 - rho) of a service time.
    wait_s = utilisation / (2 * (1 - utilisation)) * SINGLE.frame_s
    assert outcome.mean_ms == pytest.approx((SINGLE.frame_s + wait_s) * 1e3, rel=0.04)
    assert outcome.worker_busy == pytest.approx(utilisation, rel=0.02)


def test_the_single_machine_agrees_with_the_serving_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["check"]
    assert found["figures"] >= 10 and abs(found["deviation"]) <= 0.10


def test_a_wrong_model_of_a_batch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_FRAME_S", 0.0025)
    assert check.main([]) == 1


def test_the_same_seed_gives_the_same_figures() -> None:
    model, load = PodModel(0.02, 0.002), Load(rate=400, seconds=5)
    assert simulate(model, load, pods=2, seed=3) == simulate(model, load, pods=2, seed=3)
    assert simulate(model, load, pods=2, seed=3) != simulate(model, load, pods=2, seed=4)


@pytest.mark.parametrize(
    ("model", "lost"),
    [
        (PodModel(0.02, 0.002, max_pending_frames=20), "refused"),
        (PodModel(0.02, 0.002, timeout_s=0.5), "late"),
    ],
)
def test_every_frame_of_an_overload_is_accounted_for(model: PodModel, lost: str) -> None:
    outcome = simulate(model, Load(rate=500, seconds=10))
    assert outcome.asked == outcome.answered + outcome.refused + outcome.late
    assert getattr(outcome, lost) > 0


def test_the_gateway_is_the_ceiling_of_fast_workers() -> None:
    model = PodModel(0.0, 0.0001, workers=4, gateway_s=0.001)
    one = simulate(model, Load(clients=64, seconds=5))
    two = simulate(PodModel(0.0, 0.0001, workers=4, gateway_s=0.001, gateways=2), Load(clients=64, seconds=5))
    assert one.frames_per_s == pytest.approx(1000, rel=0.02) and one.gateway_busy > 0.98
    assert two.frames_per_s == pytest.approx(2000, rel=0.02)


def test_the_less_busy_of_two_pods_answers_sooner() -> None:
    model, load = PodModel(0.02, 0.002), Load(rate=2400, seconds=10)
    by_chance = simulate(model, load, pods=10)
    less_busy = simulate(model, load, pods=10, balancing="least")
    assert less_busy.p99_ms is not None and by_chance.p99_ms is not None
    assert less_busy.p99_ms < 0.9 * by_chance.p99_ms


def test_the_autoscaler_adds_pods_during_a_burst_and_removes_them_later() -> None:
    load = Load(rate=100, burst=Burst(8, 300, 3600), seconds=3000)
    fixed = simulate(PodModel(0.02, 0.002), load)
    scaled = simulate(PodModel(0.02, 0.002), load, autoscaling=Autoscaling(8, start_s=30))
    assert scaled.most_pods > 2 and scaled.answered > fixed.answered
    assert scaled.pod_hours < scaled.most_pods * 3000 / 3600


def test_the_fewest_pods_hold_the_latency_and_one_less_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rate", "1000", "--seconds", "10"]
    assert size.main([*options, "--p99-ms", "100", "--price", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])["size"]
    assert found["p99_ms"] <= 100 and lines[-2].startswith("1,000 frames cost ")
    outcome = simulate(
        PodModel(0.02, 0.002, transport_s=0.0016), Load(rate=1000, seconds=10), pods=found["pods"] - 1
    )
    assert outcome.p99_ms is not None and outcome.p99_ms > 100


def test_a_run_that_refuses_frames_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--rate", "100", "--seconds", "2"]) == 0
    assert run.main(["--rate", "1000", "--seconds", "2"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["simulation"]["refused"] > 0


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--rate", "1", "--clients", "1"],
        ["--rate", "-1"],
        ["--rate", "1", "--workers", "0"],
        ["--rate", "1", "--frame-ms", "-2"],
        ["--rate", "1", "--burst", "2", "10", "5"],
        ["--clients", "1", "--burst", "2", "5", "10"],
        ["--rate", "1", "--pods", "4", "--most-pods", "2"],
        ["--rate", "1", "--seconds", "0"],
        ["--rate", "1", "--seconds", "nan"],
        ["--rate", "1", "--seconds", "inf"],
        ["--rate", "inf"],
        ["--rate", "1", "--frame-ms", "nan"],
        ["--rate", "1", "--burst", "nan", "1", "2"],
        ["--rate", "1", "--most-pods", "3", "--start-s", "nan"],
    ],
)
def test_values_out_of_range_are_errors(options: list[str]) -> None:
    with pytest.raises(SettingsError):
        run.main(options)


@pytest.mark.parametrize(
    "options",
    [
        ["--rate", "100", "--p99-ms", "nan"],
        ["--rate", "100", "--p99-ms", "23.8"],  # a lone frame takes 23.85 ms
        ["--rate", "100", "--p99-ms", "100", "--price", "-1"],
        ["--rate", "100", "--p99-ms", "100", "--price", "inf"],
        ["--rate", "0.001", "--p99-ms", "100", "--seconds", "1"],
    ],
)
def test_what_no_number_of_pods_answers_is_an_error(options: list[str]) -> None:
    with pytest.raises(SettingsError):
        size.main(options)


@pytest.mark.parametrize("limit", ["nan", "-0.1"])
def test_a_limit_that_lets_everything_or_nothing_pass_is_an_error(limit: str) -> None:
    with pytest.raises(SettingsError):
        check.main(["--limit", limit])


def test_hours_of_pods_are_those_that_the_answers_took(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--rate", "100", "--seconds", "1", "--pods", "3"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["simulation"]
    assert found["pod_hours"] == pytest.approx(3 / 3600)
