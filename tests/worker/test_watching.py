"""Workers count what they answered before the options of a frame select from it, whichever way it came."""

from __future__ import annotations

import pytest

from serve.protocol.batch import FRAMES_CONTENT_TYPE, OUTCOMES_CONTENT_TYPE, pack_frames, unpack_outcomes
from serve.watch.statistics import Layout

pytestmark = pytest.mark.slow


def observed(handler, frames):
    return unpack_outcomes(handler.respond(memoryview(pack_frames(frames)), 0, frozenset)).observed


def test_options_of_a_frame_do_not_change_what_is_counted(handler, street):
    whole = observed(handler, [(street.tobytes(), {})])
    layout = Layout.of_classes(handler.detector.metadata.classes)
    counts = layout.read(whole)
    assert counts.frames == 1 and counts.sums["points"] == len(street)
    assert counts.sums["detections"] == sum(whole["classes"].values()) > 0
    few = observed(
        handler, [(street.tobytes(), {"score_thr": 0.99, "classes": ["Car"], "fields": ["names"]})]
    )
    assert few == whole


def test_frames_that_failed_are_not_counted(handler, street):
    found = observed(handler, [(b"odd", {}), (street.tobytes(), {})])
    assert found["frames"] == 1
    assert observed(handler, [(b"odd", {})]) is None


def test_a_batch_through_torchserve_is_counted_as_one_through_the_socket(handler, ask, street, monkeypatch):
    body = pack_frames([(street.tobytes(), {})])
    from tests.worker.context import Context

    context = Context(None, headers=[{"content-type": FRAMES_CONTENT_TYPE, "accept": OUTCOMES_CONTENT_TYPE}])
    (answer,) = handler.handle([{"body": body}], context)
    assert unpack_outcomes(answer).observed == observed(handler, [(street.tobytes(), {})])


def test_answers_are_as_ever_if_counting_fails_or_is_off(handler, street, monkeypatch):
    def fail(outcomes):
        raise RuntimeError("odd")

    body = memoryview(pack_frames([(street.tobytes(), {})]))
    whole = unpack_outcomes(handler.respond(body, 0, frozenset))
    monkeypatch.setattr(handler, "count", fail)
    failed = unpack_outcomes(handler.respond(body, 0, frozenset))
    assert failed.observed is None
    monkeypatch.undo()
    monkeypatch.setattr(handler.detector, "is_observed", False)
    off = unpack_outcomes(handler.respond(body, 0, frozenset))
    assert off.observed is None and whole.observed is not None
    assert (
        [bytes(b) for _, b in off.items]
        == [bytes(b) for _, b in failed.items]
        == [bytes(b) for _, b in whole.items]
    )
