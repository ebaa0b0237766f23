"""Counts of what a model sees on the frames of a source, for the reference that a server compares with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import numpy as np

from serve.errors import ServeError
from serve.predict.models import LocalModel
from serve.predict.pipeline import predict_frames
from serve.predict.sources import Source
from serve.protocol.options import FrameOptions
from serve.protocol.worker import ObservedAnswer
from serve.watch.observation import count_frames
from serve.watch.statistics import CLASS, SCORE_THR, SEGMENT, Counts, Layout

__all__ = ["count_source"]


def count_source(
    source: Source,
    model: LocalModel,
    *,
    score_thr: float = SCORE_THR,
    columns: str | None = None,
    batch_size: int = 1,
    failed: Callable[[str, ServeError], None] = lambda name, error: None,
    advance: Callable[[], object] = lambda: None,
) -> list[Counts]:
    """Count every frame of a source, as a worker does; returns the counts of each, in order.

    Args:
        source: the frames.
        model: a model in this process.
        score_thr: score from which a detection counts.
        columns: columns of the point clouds.
        batch_size: frames per batch.
        failed: called with the name and the error of a frame that has none.
        advance: called after every frame.

    Raises:
        ServeError: the source or the model as a whole failed.
    """
    model.detector.is_observed = True
    names = tuple(dict.fromkeys(model.detector.metadata.classes))
    every = Layout(names)  # of all classes, until it is known which ones are frequent
    found: list[Counts] = []
    with closing(predict_frames(source, model, FrameOptions(columns=columns), batch_size=batch_size)) as run:
        for prediction in run:
            if prediction.error is not None:
                failed(prediction.frame.name, prediction.error)
            elif isinstance(prediction.answer, ObservedAnswer):
                found.append(count_frames([prediction.answer.observed], every, score_thr))
            advance()
    numbers = np.sum([each.of(CLASS)[:-1] + each.of(SEGMENT)[:-1] for each in found], axis=0) if found else ()
    layout = Layout.of_classes(names, dict(zip(names, numbers, strict=False)))
    return found if layout == every else [layout.read(each.document()) for each in found]
