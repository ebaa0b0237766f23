"""Shadow traffic: a share of a model's frames goes to another version as well, whose answers are only compared.

A frame is sent once it has its answer. It waits as a background item (`serve.gateway.batcher`): it takes a
worker that has nothing else to do. What is on its way is bounded in frames and in bytes of its own; a frame beyond
that, or of a gateway that is half full, is dropped. Two answers are compared in a thread, as ``mmdet3d-serve compare``
compares them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import orjson

from serve.compare.changes import Change, ChangeRules, find_changes
from serve.errors import BackendBroken, Overloaded, ServeError, SettingsError
from serve.gateway.admission import Admission
from serve.gateway.canary import takes_same_frames
from serve.gateway.dispatch import Outcome
from serve.gateway.frame_copies import copy_views, needs_copy, share_frame
from serve.gateway.lifecycle import Lifecycle
from serve.gateway.models import ModelRegistry, ModelVersion
from serve.gateway.offload import run_beside_loop
from serve.gateway.rollout import EvenChoice, Rollout
from serve.gateway.shadow_metrics import ShadowMetrics, ShadowPair
from serve.protocol.batch import Bytes
from serve.protocol.batching import estimate_cost
from serve.protocol.options import FrameOptions
from serve.protocol.worker import EncodedFrame

__all__ = ["ShadowLimits", "ShadowTraffic", "compare_bodies"]

# Fields without which an answer has no boxes to compare.
_NEEDED = ({"bboxes_3d", "scores_3d", "labels_3d"}, {"bboxes", "scores", "labels"})
# Fields that say what boxes and labels mean, which a model's description has too.
_DESCRIBED = ("box_type_3d", "classes")
_Specs = tuple[Mapping[str, Any], Mapping[str, Any]]
# Share of the gateway's pending limits from which on no frame is sent.
_BUSY_RATIO = 0.5
_RULES = ChangeRules()
# Of each answer; they are compared each with each, which takes 32 MB a matrix for so many.
_MAX_COMPARED_BOXES = 2000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShadowLimits:
    """Bounds of what is on its way, together; each of several shadows gets an equal part of them.

    Attributes:
        frames: maximum number of frames.
        nbytes: maximum bytes of these frames and of their answers.
        wait_s: how long a frame may wait for a worker that has nothing else to do, seconds.
        timeout_s: deadline of a frame, seconds.
    """

    frames: int = 16
    nbytes: int = 64 << 20
    wait_s: float = 2.0
    timeout_s: float = 30.0


class _Dropped(Exception):
    """A frame is not compared; the argument is the reason, a label of a metric."""


class ShadowTraffic:
    """Sends frames to shadows; `observe` is an observer of frames (`ModelRegistry.frame_observers`)."""

    def __init__(
        self,
        registry: ModelRegistry,
        rollout: Rollout,
        limits: ShadowLimits,
        metrics: ShadowMetrics,
        admission: Admission,
        lifecycle: Lifecycle,
    ) -> None:
        """Send the shares of `rollout`.

        Args:
            registry: the served models.
            rollout: the shares.
            limits: bounds of what is on its way.
            metrics: count what became of each frame.
            admission: of the requests, to see how full the gateway is.
            lifecycle: whether the gateway drains.
        """
        self._registry, self._rollout, self._limits, self._metrics = registry, rollout, limits, metrics
        self._admission, self._lifecycle = admission, lifecycle
        self._choices: dict[tuple[str, str], EvenChoice] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Frames and bytes on their way, by model and shadow.
        self._frames: Counter[tuple[str, str]] = Counter()
        self._nbytes: Counter[tuple[str, str]] = Counter()
        # One thread: comparisons compete with the event loop for the interpreter.
        self._thread = ThreadPoolExecutor(1, "shadow-comparison")

    @property
    def pending(self) -> int:
        """Number of frames on their way."""
        return len(self._tasks)

    def observe(self, model: ModelVersion, frame: EncodedFrame, outcome: Outcome) -> None:
        """Choose the shadows that get a frame, and start sending it; never waits."""
        state = model.state
        for version, share in self._rollout.shadow_of(state.name).items():
            if version == state.version or self._choice(state.name, version) >= share:
                continue
            pair = (state.name, state.version, version)
            try:
                self._start(pair, model, frame, outcome)
            except _Dropped as dropped:
                self._metrics.observe_drop(pair, str(dropped))

    def show_metrics(self) -> None:
        """Show the metrics of every shadow that can be asked, also before it has got a frame."""
        for name, shares in self._rollout.shadow.items():
            canaries = self._rollout.canary_of(name)
            answering = [
                model.state.version
                for model in self._registry.all()
                if model.state.name == name and (model.state.default or canaries.get(model.state.version))
            ]
            for shadow, share in shares.items():
                found = self._registry.get(name, shadow)
                if share and found is not None and found.spec is not None:
                    for version in answering:
                        if version != shadow:
                            self._metrics.show_pair((name, version, shadow), found.spec.get("classes") or ())

    async def close(self) -> None:
        """Cancel the frames on their way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _choice(self, model: str, version: str) -> float:
        if (model, version) not in self._choices:
            self._choices[model, version] = EvenChoice(f"{model} {version}")
        return self._choices[model, version]()

    def _start(self, pair: ShadowPair, model: ModelVersion, frame: EncodedFrame, outcome: Outcome) -> None:
        if self._lifecycle.draining:
            raise _Dropped("draining")
        if isinstance(outcome, ServeError):
            raise _Dropped("unanswered")
        fields = frame.options.fields
        if fields is not None and not any(needed <= {*fields} for needed in _NEEDED):
            raise _Dropped("options")
        admission, limits = self._admission, self._limits
        nbytes = frame.nbytes + len(outcome.value.body)
        key, shadows = (pair[0], pair[2]), self._rollout.count_shadows()
        # A slow shadow leaves the others their part.
        if (
            len(self._tasks) >= limits.frames
            or self._frames[key] >= max(1, limits.frames // shadows)
            or self._nbytes.total() + nbytes > limits.nbytes
            or (self._nbytes[key] and self._nbytes[key] + nbytes > limits.nbytes // shadows)
            or admission.items > _BUSY_RATIO * admission.max_items
            or admission.bytes > _BUSY_RATIO * admission.max_bytes
        ):
            raise _Dropped("busy")
        shadow = self._registry.find_ready(pair[0], pair[2])
        if shadow is None:
            raise _Dropped("not_ready")
        if not takes_same_frames(shadow, model):
            raise _Dropped("other_inputs")
        specs = (model.spec or {}, shadow.spec or {})
        task = asyncio.create_task(self._run(pair, shadow, specs, share_frame(frame), outcome.value.body))
        self._tasks.add(task)
        self._frames[key] += 1
        self._nbytes[key] += nbytes
        task.add_done_callback(lambda done: self._finish(done, key, nbytes))

    def _finish(self, task: asyncio.Task[None], key: tuple[str, str], nbytes: int) -> None:
        self._tasks.discard(task)
        self._frames[key] -= 1
        self._nbytes[key] -= nbytes

    async def _run(
        self, pair: ShadowPair, shadow: ModelVersion, specs: _Specs, frame: EncodedFrame, answer: Bytes
    ) -> None:
        try:
            if needs_copy(frame):
                frame = await run_beside_loop(frame.nbytes, copy_views, 0, frame)
            answer = await run_beside_loop(len(answer), bytes, 0, answer)  # a view of its batch's answers
            body = await self._ask(shadow, frame)
            changes = await asyncio.get_running_loop().run_in_executor(
                self._thread, compare_bodies, answer, body, frame.options, specs
            )
            self._metrics.observe_changes(pair, changes)
        except _Dropped as dropped:
            self._metrics.observe_drop(pair, str(dropped))
        except TimeoutError:
            self._metrics.observe_failure(pair, "deadline_exceeded")
        except ServeError as error:
            self._metrics.observe_failure(pair, error.code)
        except Exception:
            logger.exception("a frame for the shadow %s of %s failed unexpectedly", pair[2], pair[0])
            self._metrics.observe_failure(pair, ServeError.code)

    async def _ask(self, shadow: ModelVersion, frame: EncodedFrame) -> Bytes:
        assert shadow.batcher is not None
        cost = estimate_cost(frame, shadow.spec or {})
        async with asyncio.timeout(self._limits.timeout_s):
            try:
                result = await shadow.batcher.submit(
                    frame, cost=cost.cost, nbytes=cost.nbytes, key=cost.key, background_s=self._limits.wait_s
                )
            except Overloaded:
                raise _Dropped("busy") from None
        return result.value.body


def compare_bodies(
    before: Bytes, after: Bytes, options: FrameOptions, specs: _Specs = ({}, {})
) -> list[Change]:
    """Compare two answers to a frame, as far as its options let both be seen.

    A pair is found down to half of the score from which a detection counts. A client that asked for higher scores
    only, or for the best few, does not see that far: then a detection counts from twice the lowest score that it sees.

    Args:
        before: the answer that the client got, JSON.
        after: the shadow's answer.
        options: of the frame.
        specs: descriptions of both versions, for what `fields` left out of the answers.

    Raises:
        _Dropped: nothing in the answers can be compared.
        BackendBroken: an answer is not JSON.
    """
    try:
        answers: list[dict[str, Any]] = [
            {**{name: spec[name] for name in _DESCRIBED if spec.get(name)}, **orjson.loads(body)}
            for spec, body in zip(specs, (before, after), strict=True)
        ]
    except orjson.JSONDecodeError as error:
        raise BackendBroken(f"a worker's answer is not JSON: {error}") from None
    lowest = max(_lowest_visible(answer, options) for answer in answers)
    rules = _RULES
    if lowest > rules.lowest:
        if 2 * lowest > 1:
            raise _Dropped("options")
        rules = replace(rules, score_thr=max(rules.score_thr, 2 * lowest), low_score=lowest)
    if any(
        sum(score >= rules.lowest for score in _scores(answer)) > _MAX_COMPARED_BOXES for answer in answers
    ):
        raise _Dropped("many_boxes")
    try:
        return find_changes(answers[0], answers[1], rules)
    except SettingsError:
        raise _Dropped("no_boxes") from None


def _lowest_visible(answer: Mapping[str, Any], options: FrameOptions) -> float:
    """Return the score from which on an answer has every detection of its model."""
    lowest = max([options.score_thr, *(score for _, score in options.class_thr)])
    scores = _scores(answer)
    if options.max_detections is not None and len(scores) >= options.max_detections:
        return max(lowest, min(scores, default=1.0))
    return lowest


def _scores(answer: Mapping[str, Any]) -> list[float]:
    return answer.get("scores_3d", answer.get("scores")) or []
