"""Tracks over the moving scene: ids that stay, and what starts, ends and bounds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.errors import BadRequest
from serve.synthetic.moving import FRAMES, MOVERS, true_boxes
from serve.tracking import UNTRACKED, Detections, Tracker, TrackOptions
from serve.tracking.space import SpaceTracks
from tests.tracking.sequences import CYCLIST, LABELS, detections_at, follow

ALL = np.arange(len(MOVERS))


def one_box(x: float, *, y: float = 0.0, yaw: float = 0.0, score: float = 0.9, label: int = 2) -> Detections:
    return Detections(np.array([[x, y, -1.7, 4.0, 1.6, 1.5, yaw]]), np.array([score]), np.array([label]))


@pytest.mark.parametrize("seed", range(5))
def test_crossing_paths_keep_their_ids(seed: int) -> None:
    followed = follow(Tracker(), seed=seed)
    assert followed.score.switches == 0
    assert followed.score.mota > 0.99
    assert [len(followed.tracks_of(k)) for k in ALL] == [1] * len(MOVERS)


def hidden_between(first: int, last: int) -> Callable[[int], NDArray[np.int64]]:
    """What is seen while the cyclist is hidden."""
    others = np.delete(ALL, CYCLIST)
    return lambda number: others if first <= number < last else ALL


def test_a_hidden_object_keeps_its_id_for_a_second() -> None:
    followed = follow(Tracker(), seen_at=hidden_between(15, 24))
    assert len(followed.tracks_of(CYCLIST)) == 1
    assert followed.score.switches == 0


def test_an_object_hidden_for_longer_gets_a_new_id() -> None:
    followed = follow(Tracker(), seen_at=hidden_between(15, 28))
    assert len(followed.tracks_of(CYCLIST)) == 2
    assert followed.score.switches == 1
    kept = follow(Tracker(TrackOptions(max_age_s=2.0)), seen_at=hidden_between(15, 28))
    assert len(kept.tracks_of(CYCLIST)) == 1


def test_empty_frames_keep_the_ids() -> None:
    followed = follow(Tracker(), seen_at=lambda number: ALL[:0] if 20 <= number < 25 else ALL)
    assert followed.score.switches == 0
    assert len({t for _, tracks in followed.frames for t in tracks.tolist() if t > 0}) == len(MOVERS)


def test_a_gap_keeps_the_ids_if_the_frames_have_times() -> None:
    numbers = [number for number in range(FRAMES) if not 30 <= number < 36]
    assert follow(Tracker(), numbers=numbers).score.switches == 0
    # Without times the car that drives at 8 m/s is not where it is looked for.
    assert follow(Tracker(), numbers=numbers, timed=False).score.switches > 0


def test_a_gap_longer_than_an_object_may_be_unseen_starts_anew() -> None:
    followed = follow(Tracker(), numbers=[*range(10), *range(25, 40)])
    before, after = (
        {t for _, tracks in part for t in tracks.tolist() if t > 0}
        for part in (followed.frames[:10], followed.frames[10:])
    )
    assert before and after and not before & after


def test_times_of_any_origin_give_the_same_ids() -> None:
    one, other = Tracker(), Tracker()
    rng, again = np.random.default_rng(1), np.random.default_rng(1)
    for number in range(FRAMES):
        near = one.update(detections_at(number / 10, ALL, rng), number / 10)
        far = other.update(detections_at(number / 10, ALL, again), 1.7e9 + number / 10)
        assert near.tolist() == far.tolist()


def test_classes_are_matched_apart() -> None:
    tracker = Tracker()
    assert tracker.update(one_box(10, label=2)).tolist() == [1]
    assert tracker.update(one_box(10, label=1)).tolist() == [2]


def test_an_object_is_confirmed_by_its_third_detection() -> None:
    tracker = Tracker()
    for _ in range(4):
        tracker.update(one_box(10))
    both = Detections(
        np.concatenate([one_box(10).boxes, one_box(40).boxes]), np.array([0.9, 0.9]), np.array([2, 2])
    )
    assert [tracker.update(both).tolist() for _ in range(3)] == [[1, UNTRACKED], [1, UNTRACKED], [1, 2]]


def test_in_the_first_frames_every_track_is_confirmed() -> None:
    assert Tracker().update(one_box(10)).tolist() == [1]


def test_low_scores_go_on_with_a_track_and_start_none() -> None:
    tracker = Tracker()
    assert tracker.update(one_box(10, score=0.2)).tolist() == [UNTRACKED]
    assert tracker.update(one_box(10, score=0.9)).tolist() == [1]
    assert tracker.update(one_box(10, score=0.2)).tolist() == [1]
    assert tracker.update(one_box(10, score=0.05)).tolist() == [UNTRACKED]


def test_a_heading_mistaken_by_half_a_turn_keeps_track_and_size() -> None:
    rng = np.random.default_rng(0)

    def flip(found: Detections) -> Detections:
        boxes = found.boxes.copy()
        boxes[:, 6] += np.where(rng.random(len(boxes)) < 0.3, np.pi, 0.0)
        return replace(found, boxes=boxes)

    assert follow(Tracker(), change=flip).score.switches == 0


def test_a_flipped_heading_does_not_turn_the_track_across() -> None:
    tracker = Tracker()
    for k in range(8):
        tracker.update(one_box(10, yaw=3.0 if k in (2, 5) else -0.1))
        assert isinstance(tracker._tracks, SpaceTracks)
        assert abs(np.sin(tracker._tracks.filters.boxes[0, 6])) < 0.2, k


def test_a_heading_about_the_full_turn_is_not_averaged_across() -> None:
    tracker = Tracker()
    for k in range(10):
        tracker.update(one_box(10 + k * 0.5, yaw=np.pi - 0.02 if k % 2 else -np.pi + 0.02))
    assert isinstance(tracker._tracks, SpaceTracks)
    yaw = float(tracker._tracks.filters.boxes[0, 6])
    assert abs(abs(yaw) - np.pi) < 0.05 or abs(yaw) < 1e-9


def test_measured_velocities_find_a_fast_object_in_its_second_frame() -> None:
    def update(tracker: Tracker, x: float) -> list[int]:
        found = replace(one_box(x), velocities=np.array([[30.0, np.nan]]))
        return tracker.update(found).tolist()

    slow = TrackOptions(rate=2.0)
    tracker = Tracker(slow)
    assert [update(tracker, 10), update(tracker, 25)] == [[1], [1]]
    blind = Tracker(slow)
    assert [blind.update(one_box(10)).tolist(), blind.update(one_box(25)).tolist()] == [[1], [2]]


def test_the_number_of_tracks_is_bounded() -> None:
    tracker = Tracker(TrackOptions(max_tracks=5))
    rng = np.random.default_rng(0)
    for frame in range(50):
        boxes = np.tile(one_box(0).boxes, (40, 1))
        boxes[:, :2] = rng.uniform(-500, 500, (40, 2))
        ids = tracker.update(Detections(boxes, rng.uniform(0.3, 1, 40), np.full(40, 2)), frame * 0.3)
        assert len(tracker) <= 5 and (ids > 0).sum() <= 5


def test_a_time_that_is_not_after_the_last_is_refused() -> None:
    tracker = Tracker()
    tracker.update(one_box(10), 5.0)
    for time_s in (5.0, 4.9, float("nan"), float("inf")):
        with pytest.raises(BadRequest):
            tracker.update(one_box(10), time_s)
    assert tracker.update(one_box(10), 5.1).tolist() == [1]


def test_boxes_of_another_kind_are_refused() -> None:
    tracker = Tracker()
    tracker.update(one_box(10))
    with pytest.raises(BadRequest):
        tracker.update(Detections(np.zeros((1, 4)), np.ones(1), np.zeros(1, np.int64)))


def test_boxes_without_finite_numbers_get_no_id() -> None:
    tracker = Tracker()
    for value in (np.nan, np.inf, 1e30):
        found = one_box(10)
        found.boxes[0, 0] = value
        assert tracker.update(found).tolist() == [UNTRACKED]
    assert len(tracker) == 0


def test_the_script_holds_the_hard_cases() -> None:
    """The moving scene would prove nothing if its objects kept apart."""
    apart = [
        np.linalg.norm(true_boxes(n / 10)[:, None, :2] - true_boxes(n / 10)[None, :, :2], axis=-1)
        + 1e9 * (LABELS[:, None] != LABELS[None]) + 1e9 * np.eye(len(MOVERS))
        for n in range(FRAMES)
    ]  # fmt: skip
    assert 0.6 < np.min(apart) < 1.0
