"""The simulated service: pods with a gateway and workers, behind a load balancer.

Time is in seconds. What is modelled, and by which rule of the gateway:

* **gateway**: each of its processes computes one frame after another, half of `gateway_s` before the queue and half
  after the answer. A pod refuses a frame beyond `max_pending_frames` (429).
* **queue**: first in, first out; a free worker takes up to `batch_frames` at once, and no batch waits for a timer. A
  frame whose deadline has passed is left out.
* **worker**: a batch of n frames takes ``batch_s + n · frame_s``. An idle worker gets its batch half of `transport_s`
  later; a busy one has the next batch `lead_time_s` before it is free, so that transport is hidden.

Left out: bytes and their bound, prefetching of full batches (it changes no batch of a queue that is first in, first
out), failures, and whatever shares the machine.
"""

from __future__ import annotations

import math
import random
from array import array
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import simpy

__all__ = ["Balancing", "Frame", "Pod", "PodModel", "Service", "Statistics"]

Balancing = Literal["random", "least"]
Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class PodModel:
    """Measured figures of one pod and settings of its gateway.

    Attributes:
        batch_s: seconds of a batch beside those of its frames.
        frame_s: seconds that each frame adds to its batch.
        workers: workers of the model.
        batch_frames: most frames of a batch.
        gateway_s: CPU seconds of the gateway per frame.
        gateways: gateway processes that share the port.
        transport_s: seconds from the queue to an idle worker and back.
        lead_time_s: seconds before a worker is free at which its next batch is sent.
        max_pending_frames: frames in a pod, from their arrival to their answer; more are refused.
        timeout_s: deadline of a frame.
    """

    batch_s: float
    frame_s: float
    workers: int = 1
    batch_frames: int = 16
    gateway_s: float = 0.00025
    gateways: int = 1
    transport_s: float = 0.0015
    lead_time_s: float = 0.002
    max_pending_frames: int = 256
    timeout_s: float = 30.0

    @property
    def frames_per_s(self) -> float:
        """Most frames per second of a pod: of its workers with full batches, or of its gateways."""
        worker = self.batch_frames / (self.batch_s + self.batch_frames * self.frame_s)
        gateway = self.gateways / self.gateway_s if self.gateway_s else math.inf
        return min(self.workers * worker, gateway)

    @property
    def lone_s(self) -> float:
        """Seconds from a lone frame to its answer."""
        return self.batch_s + self.frame_s + self.gateway_s + self.transport_s


@dataclass(eq=False)
class Frame:
    """A frame on its way.

    Attributes:
        asked_at: time of its arrival.
        pod: pod that has it.
        answered: called with the time of the answer; None of a frame that was refused or came late.
    """

    asked_at: float
    pod: Pod
    answered: Callable[[float | None], None]


@dataclass
class Statistics:
    """Counts of the time between `since` and `until`: frames by their arrival, computing by its end.

    Attributes:
        since: end of the warm-up.
        until: end of the measurement.
        asked: frames that arrived.
        refused: frames that the pod's limit refused (429).
        late: frames whose deadline passed (504).
        latencies_s: seconds from arrival to answer of each answered frame.
        batches: batches, and the frames in them.
        worker_s: seconds for which workers computed.
        gateway_s: seconds for which gateways computed.
        pod_s: seconds for which pods were up since the warm-up, added up.
        most_pods: largest number of pods.
    """

    since: float = 0.0
    until: float = math.inf
    asked: int = 0
    refused: int = 0
    late: int = 0
    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    batches: int = 0
    frames: int = 0
    worker_s: float = 0.0
    gateway_s: float = 0.0
    pod_s: float = 0.0
    most_pods: int = 0

    def counts(self, moment: float) -> bool:
        """Return whether something of that moment counts."""
        return self.since <= moment < self.until


class Pod:
    """One pod: gateway processes, a queue and workers."""

    def __init__(self, env: simpy.Environment, model: PodModel, statistics: Statistics) -> None:
        self._env, self._model, self._statistics = env, model, statistics
        self._queue: deque[Frame] = deque()
        self._idle: list[simpy.Event] = []
        self._gateway_free_at = [0.0] * model.gateways
        self._next_gateway = 0
        self.pending = 0
        self.most_pending = 0  # since the autoscaler last looked
        self.started_at = env.now
        for _ in range(model.workers):
            env.process(self._work())

    def accept(self, frame: Frame) -> bool:
        """Take a frame; False if the pod holds as many as it may."""
        if self.pending >= self._model.max_pending_frames:
            return False
        self.pending += 1
        self.most_pending = max(self.most_pending, self.pending)
        self._compute(partial(self._queue_frame, frame))
        return True

    def _compute(self, then: Callable[[], None]) -> None:
        """Let a gateway process compute half a frame, after what it has to do already."""
        if not self._model.gateway_s:
            then()
            return
        self._next_gateway = (self._next_gateway + 1) % len(self._gateway_free_at)
        half_s = self._model.gateway_s / 2
        ready_at = max(self._env.now, self._gateway_free_at[self._next_gateway]) + half_s
        self._gateway_free_at[self._next_gateway] = ready_at
        if self._statistics.counts(self._env.now):
            self._statistics.gateway_s += half_s
        self._later(ready_at - self._env.now, then)

    def _later(self, delay_s: float, then: Callable[[], None]) -> None:
        """Call `then` after a delay; cheaper than a process."""
        callbacks = self._env.timeout(delay_s).callbacks
        assert callbacks is not None  # only an event of the past has none
        callbacks.append(lambda _: then())

    def _queue_frame(self, frame: Frame) -> None:
        self._queue.append(frame)
        if self._idle:
            self._idle.pop().succeed()

    def _take_batch(self) -> list[Frame]:
        batch: list[Frame] = []
        while self._queue and len(batch) < self._model.batch_frames:
            frame = self._queue.popleft()
            if self._env.now - frame.asked_at > self._model.timeout_s:
                self._give_up(frame)
            else:
                batch.append(frame)
        return batch

    def _work(self) -> Process:
        env, model = self._env, self._model
        while True:
            if not self._queue:
                self._idle.append(wake := env.event())
                yield wake
            batch = self._take_batch()
            if batch:
                yield env.timeout(model.transport_s / 2)
            while batch:
                run_s = model.batch_s + len(batch) * model.frame_s
                lead_s = min(model.lead_time_s, run_s)
                yield env.timeout(run_s - lead_s)
                upcoming = self._take_batch()
                yield env.timeout(lead_s)
                if self._statistics.counts(env.now):
                    self._statistics.batches += 1
                    self._statistics.frames += len(batch)
                    self._statistics.worker_s += run_s
                self._later(model.transport_s / 2, partial(self._answer, batch))
                batch = upcoming

    def _answer(self, batch: list[Frame]) -> None:
        for frame in batch:
            self._compute(partial(self._finish, frame))

    def _finish(self, frame: Frame) -> None:
        latency_s = self._env.now - frame.asked_at
        if latency_s > self._model.timeout_s:
            self._give_up(frame)
            return
        self.pending -= 1
        if self._statistics.counts(frame.asked_at):
            self._statistics.latencies_s.append(latency_s)
        frame.answered(self._env.now)

    def _give_up(self, frame: Frame) -> None:
        """Answer 504."""
        self.pending -= 1
        if self._statistics.counts(frame.asked_at):
            self._statistics.late += 1
        frame.answered(None)


class Service:
    """Pods behind a load balancer.

    Args:
        env: environment of the simulation.
        model: what each pod does.
        pods: number of pods at the start.
        balancing: ``random``: any pod, as a Kubernetes Service does for connections of many clients; ``least``: the
            less busy one of two random pods, as Envoy and Istio do (least request).
        rng: source of the balancer's choices.
    """

    def __init__(
        self, env: simpy.Environment, model: PodModel, pods: int, balancing: Balancing, rng: random.Random
    ) -> None:
        self.env, self.model, self._balancing, self._rng = env, model, balancing, rng
        self.statistics = Statistics()
        self.pods: list[Pod] = []
        for _ in range(pods):
            self.add_pod()

    def add_pod(self) -> None:
        """Add a pod that is ready."""
        self.pods.append(Pod(self.env, self.model, self.statistics))
        self.statistics.most_pods = max(self.statistics.most_pods, len(self.pods))

    def remove_pod(self) -> None:
        """Take a pod from the balancer; it answers what it has."""
        self._count_time(self.pods.pop())

    def submit(self, answered: Callable[[float | None], None] = lambda _: None) -> bool:
        """Send one frame to a pod; `answered` is called with the time of the answer, or None. False if refused."""
        pod = self._choose()
        counts = self.statistics.counts(self.env.now)
        if counts:
            self.statistics.asked += 1
        if pod.accept(Frame(self.env.now, pod, answered)):
            return True
        if counts:
            self.statistics.refused += 1
        return False

    def _choose(self) -> Pod:
        pods, draw = self.pods, self._rng.random
        first = pods[int(draw() * len(pods))]
        if self._balancing == "random" or len(pods) == 1:
            return first
        second = pods[int(draw() * len(pods))]
        return second if second.pending < first.pending else first

    def close(self) -> None:
        """Count the time of the pods that are still up."""
        for pod in self.pods:
            self._count_time(pod)

    def _count_time(self, pod: Pod) -> None:
        since = max(pod.started_at, self.statistics.since)
        self.statistics.pod_s += max(0.0, self.env.now - since)
