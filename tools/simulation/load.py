"""What arrives at the simulated service: Poisson arrivals with bursts, clients in a closed loop, and an autoscaler."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import simpy

from tools.simulation.service import Balancing, PodModel, Service, Statistics

__all__ = ["Autoscaling", "Burst", "Load", "Outcome", "simulate"]

Process = Generator[simpy.Event, Any, None]
# The controller's own figures: its period, and the deviation that it lets pass.
# https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/
_SCALING_PERIOD_S = 15.0
_SCALING_TOLERANCE = 0.1


@dataclass(frozen=True)
class Burst:
    """A higher rate that returns: `factor` times the rate for `length_s` of every `period_s` seconds."""

    factor: float
    length_s: float
    period_s: float


@dataclass(frozen=True)
class Load:
    """What clients do.

    Attributes:
        rate: mean arrivals per second outside of bursts, independent of answers (Poisson).
        clients: clients in a closed loop instead, each with one frame at a time; a refused one waits a second.
        burst: bursts on top of `rate`.
        seconds: length of the measurement.
        warmup_s: seconds before it that do not count.
    """

    rate: float = 0.0
    clients: int = 0
    burst: Burst | None = None
    seconds: float = 60.0
    warmup_s: float = 5.0


@dataclass(frozen=True)
class Autoscaling:
    """The manifests' HorizontalPodAutoscaler (k8s/components/autoscale-on-pending).

    Attributes:
        most_pods: largest number of pods; the number at the start is the smallest.
        target: share of a pod's pending frames that is aimed at, mean over the pods of their maximum over a minute.
        start_s: seconds from the decision to a pod that is ready: scheduling, image, loading the models.
        keep_s: a pod is removed only if for so long fewer would have done.
    """

    most_pods: int
    target: float = 0.25
    start_s: float = 60.0
    keep_s: float = 600.0


@dataclass(frozen=True)
class Outcome:
    """Figures of a run.

    Attributes:
        asked: frames that arrived.
        answered: frames with an answer.
        refused: frames answered 429.
        late: frames whose deadline passed.
        frames_per_s: answered frames per second.
        mean_ms: mean latency of the answered; None if there is none.
        p50_ms: median latency.
        p99_ms: 99th percentile.
        mean_batch: mean frames per batch.
        worker_busy: share of time for which workers computed.
        gateway_busy: the same of the gateway processes.
        most_pods: largest number of pods.
        pod_hours: hours of all pods, without the warm-up.
    """

    asked: int
    answered: int
    refused: int
    late: int
    frames_per_s: float
    mean_ms: float | None
    p50_ms: float | None
    p99_ms: float | None
    mean_batch: float
    worker_busy: float
    gateway_busy: float
    most_pods: int
    pod_hours: float


def simulate(
    model: PodModel,
    load: Load,
    *,
    pods: int = 1,
    balancing: Balancing = "random",
    autoscaling: Autoscaling | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Outcome:
    """Run a load on a service; the same seed gives the same figures.

    Args:
        model: what each pod does.
        load: what arrives.
        pods: number of pods, of an autoscaled service at the start.
        balancing: how frames are spread over the pods.
        autoscaling: how the number of pods changes; None: not at all.
        seed: of arrivals and balancing.
        progress: called every simulated second with the time.
    """
    rng = random.Random(seed)
    env = simpy.Environment()
    service = Service(env, model, pods, balancing, rng)
    service.statistics.since = load.warmup_s
    end_s = service.statistics.until = load.warmup_s + load.seconds
    if load.rate:
        env.process(_arrive(service, load, end_s, rng))
    for _ in range(load.clients):
        env.process(_ask_again(service, end_s))
    if autoscaling is not None:
        env.process(_autoscale(service, autoscaling, pods))
    for second in range(math.ceil(end_s)):
        env.run(until=min(second + 1.0, end_s))
        if progress is not None:
            progress(env.now)
    service.close()
    pod_s = service.statistics.pod_s
    # What has arrived is answered or comes late; the autoscaler and idle workers would go on for ever.
    slowest_s = model.batch_s + model.batch_frames * (model.frame_s + model.gateway_s) + model.transport_s
    env.run(until=end_s + model.timeout_s + 2 * slowest_s)
    return _summarize(service.statistics, model, load, pod_s)


def _arrive(service: Service, load: Load, end_s: float, rng: random.Random) -> Process:
    """Send frames at random moments, thinned from the highest rate outside of bursts."""
    env, burst = service.env, load.burst
    most = load.rate * max(1.0, burst.factor if burst else 1.0)
    while True:
        yield env.timeout(rng.expovariate(most))
        if env.now >= end_s:
            return
        bursting = burst is not None and env.now % burst.period_s < burst.length_s
        rate = load.rate * burst.factor if burst is not None and bursting else load.rate
        if rng.random() * most < rate:
            service.submit()


def _ask_again(service: Service, end_s: float) -> Process:
    """Send a frame whenever the one before it is answered."""
    env = service.env
    while env.now < end_s:
        answer = env.event()
        if service.submit(lambda _, answer=answer: answer.succeed()):  # type: ignore[misc]
            yield answer
        else:
            yield env.timeout(1.0)


def _autoscale(service: Service, scaling: Autoscaling, fewest: int) -> Process:
    """Add and remove pods as the manifests' autoscaler does: at most twice as many in a minute, one less in two."""
    env = service.env
    limit = service.model.max_pending_frames
    recent: deque[dict[int, float]] = deque(maxlen=round(60 / _SCALING_PERIOD_S))
    wanted: deque[tuple[float, int]] = deque()
    starting = 0
    raised_at, lowered_at = -math.inf, -math.inf

    def start() -> Process:
        nonlocal starting
        yield env.timeout(scaling.start_s)
        starting -= 1
        service.add_pod()

    while True:
        yield env.timeout(_SCALING_PERIOD_S)
        recent.append({id(pod): pod.most_pending / limit for pod in service.pods})
        for pod in service.pods:
            pod.most_pending = pod.pending
        peaks = [max(seen.get(id(pod), 0.0) for seen in recent) for pod in service.pods]
        total = len(service.pods) + starting
        ratio = sum(peaks) / len(peaks) / scaling.target
        desired = total if abs(ratio - 1) <= _SCALING_TOLERANCE else math.ceil(ratio * len(service.pods))
        desired = min(scaling.most_pods, max(fewest, desired))
        wanted.append((env.now, desired))
        while wanted[0][0] < env.now - scaling.keep_s:
            wanted.popleft()
        if desired > total and env.now - raised_at >= 60:
            raised_at = env.now
            for _ in range(min(desired, 2 * total) - total):
                starting += 1
                env.process(start())
        elif max(count for _, count in wanted) < total and not starting and env.now - lowered_at >= 120:
            lowered_at = env.now
            service.remove_pod()


def _summarize(statistics: Statistics, model: PodModel, load: Load, pod_s: float) -> Outcome:
    latencies = sorted(statistics.latencies_s)

    def quantile(share: float) -> float | None:
        return latencies[min(len(latencies) - 1, int(share * len(latencies)))] * 1e3 if latencies else None

    return Outcome(
        asked=statistics.asked,
        answered=len(latencies),
        refused=statistics.refused,
        late=statistics.late,
        frames_per_s=len(latencies) / load.seconds,
        mean_ms=math.fsum(latencies) / len(latencies) * 1e3 if latencies else None,
        p50_ms=quantile(0.5),
        p99_ms=quantile(0.99),
        mean_batch=statistics.frames / max(1, statistics.batches),
        worker_busy=min(1.0, statistics.worker_s / (pod_s * model.workers)),
        gateway_busy=min(1.0, statistics.gateway_s / (pod_s * model.gateways)),
        most_pods=statistics.most_pods,
        pod_hours=pod_s / 3600,
    )
