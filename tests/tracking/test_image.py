"""Tracks in images: ids by the package `trackers`, and the rules that are added to it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.tracking import UNTRACKED, Detections, Tracker, TrackOptions
from serve.tracking.clear_mot import ClearMot

pytest.importorskip("trackers", reason="trackers is not installed")

Boxes = Sequence[tuple[float, float]]


def people(centres: Boxes, *, scores: Sequence[float] = (), labels: Sequence[int] = ()) -> Detections:
    """Boxes of 40 x 100 pixels."""
    boxes = np.array([(x, y, 40.0, 100.0) for x, y in centres], np.float64).reshape(-1, 4)
    return Detections(
        boxes, np.array(scores or [0.9] * len(centres)), np.array(labels or [0] * len(centres), np.int64)
    )


def follow(tracker: Tracker, found: Detections, frames: int = 3) -> list[list[int]]:
    return [tracker.update(found).tolist() for _ in range(frames)]


def test_a_track_has_an_id_from_its_third_detection_in_a_row_on() -> None:
    tracker = Tracker()
    assert follow(tracker, people([(100, 100)]), 4) == [[UNTRACKED], [UNTRACKED], [1], [1]]
    both = people([(100, 100), (400, 100)])
    assert follow(tracker, both) == [[1, UNTRACKED], [1, UNTRACKED], [1, 2]]


def test_ids_stay_through_a_crossing() -> None:
    tracker = Tracker(TrackOptions(rate=25))
    ids = [tracker.update(people([(100 + 8 * k, 200), (580 - 8 * k, 230)])).tolist() for k in range(60)]
    assert ids[2:] == [[1, 2]] * 58


@pytest.mark.parametrize(("unseen_frames", "expected"), [(9, 1), (10, UNTRACKED)])
def test_an_unseen_object_keeps_its_id_for_a_second(unseen_frames: int, expected: int) -> None:
    tracker = Tracker()
    follow(tracker, people([(100, 100)]))
    follow(tracker, people([]), unseen_frames)
    assert tracker.update(people([(100, 100)])).tolist() == [expected]


def test_a_pause_longer_than_an_object_may_be_unseen_ends_its_track() -> None:
    tracker = Tracker()
    for k in range(3):
        tracker.update(people([(100, 100)]), 1.7e9 + k / 10)
    assert tracker.update(people([(100, 100)]), 1.7e9 + 1.1).tolist() == [1]
    assert tracker.update(people([(100, 100)]), 1.7e9 + 2.5).tolist() == [UNTRACKED]


def test_velocities_are_of_time_rather_than_of_frames() -> None:
    """A gap of several periods is bridged where the object is by then, 90 pixels on."""
    times = [*np.arange(10) / 10, 1.8, 1.9]
    timed, untimed = Tracker(), Tracker()
    ids = [timed.update(people([(100 * t, 100)]), t).tolist() for t in times]
    blind = [untimed.update(people([(100 * t, 100)])).tolist() for t in times]
    assert ids[-1] == [1] and blind[-1] != [1]


def test_classes_are_matched_apart_and_share_one_count_of_ids() -> None:
    tracker = Tracker()
    first = people([(100, 100), (100, 100), (300, 100)], labels=[7, 2, 7])
    assert follow(tracker, first)[-1] == [1, 2, 3]
    swapped = people([(300, 100), (100, 100), (100, 100)], labels=[7, 2, 7])
    assert tracker.update(swapped).tolist() == [3, 2, 1]


def test_a_class_that_comes_back_gets_a_new_id() -> None:
    tracker = Tracker()
    both = people([(100, 100), (300, 100)], labels=[1, 2])
    assert follow(tracker, both)[-1] == [1, 2]
    follow(tracker, people([(300, 100)], labels=[2]), 20)
    assert follow(tracker, both)[-1] == [3, 2]


def test_low_scores_go_on_with_a_track_and_start_none() -> None:
    tracker = Tracker()
    assert follow(tracker, people([(100, 100)], scores=[0.2]))[-1] == [UNTRACKED]
    follow(tracker, people([(100, 100)]))
    assert tracker.update(people([(100, 100)], scores=[0.2])).tolist() == [1]
    assert tracker.update(people([(100, 100)], scores=[0.05])).tolist() == [UNTRACKED]


def test_what_is_kept_of_a_sequence_is_bounded() -> None:
    tracker = Tracker(TrackOptions(max_tracks=5, min_hits=2, max_age_s=0.1))
    rng = np.random.default_rng(0)
    shown = set()
    for _ in range(60):
        found = people(
            rng.uniform(0, 5000, (40, 2)).tolist(),
            scores=rng.uniform(0.3, 1, 40).tolist(),
            labels=rng.integers(0, 1000, 40).tolist(),
        )
        for ids in follow(tracker, found):
            assert len(tracker) <= 5 and (np.array(ids) > 0).sum() <= 5
            shown |= {*ids}
    assert len(shown) > 100
    assert len(pickle.dumps(tracker)) < 50_000


def test_boxes_without_finite_numbers_get_no_id() -> None:
    tracker = Tracker()
    for x in (np.nan, np.inf, 1e30):
        assert follow(tracker, people([(x, 100)]))[-1] == [UNTRACKED]
    assert len(tracker) == 0


def test_boxes_of_no_size_are_followed_or_left_out_without_an_error() -> None:
    tracker = Tracker()
    flat = Detections(np.array([[50.0, 50, 0, 0], [90, 90, -5, 10]]), np.ones(2), np.zeros(2, np.int64))
    assert [len(ids) for ids in (tracker.update(flat), tracker.update(people([])), tracker.update(flat))] == [
        2,
        0,
        2,
    ]


def crowd(seed: int, frames: int = 60) -> list[tuple[Detections, NDArray[np.int64]]]:
    """People who walk across each other, with a detector's errors; with the true number of each detection."""
    rng = np.random.default_rng(seed)
    places, steps = rng.uniform(0, 1200, (20, 2)), rng.normal(0, 6, (20, 2))
    found = []
    for k in range(frames):
        seen = np.flatnonzero(rng.random(20) > 0.05)
        centres = places[seen] + k * steps[seen] + rng.normal(0, 1.5, (len(seen), 2))
        found.append((people(centres.tolist(), scores=rng.uniform(0.2, 1, len(seen)).tolist()), seen))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_crowd_keeps_its_ids(seed: int) -> None:
    tracker, score = Tracker(), ClearMot(reach=20)
    for found, seen in crowd(seed):
        ids = tracker.update(found)
        shown = ids != UNTRACKED
        score.update(seen, found.boxes[:, :2], ids[shown], found.boxes[shown, :2])
    assert score.mota > 0.9 and score.switches <= 4 and score.false_tracks == 0


def test_trackers_of_several_threads_do_not_meet() -> None:
    def ids_of(seed: int) -> list[list[int]]:
        tracker = Tracker()
        return [tracker.update(found).tolist() for found, _ in crowd(seed, 30)]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ids_of, range(4))) == [ids_of(seed) for seed in range(4)]


def test_a_tracker_goes_on_after_it_was_stored() -> None:
    frames = crowd(0, 20)
    one = Tracker()
    for found, _ in frames[:10]:
        one.update(found)
    other = pickle.loads(pickle.dumps(one))
    for found, _ in frames[10:]:
        assert one.update(found).tolist() == other.update(found).tolist()


def test_drawing_and_video_packages_are_not_imported() -> None:
    """What the lock leaves out of what trackers asks for."""
    script = (
        "import numpy as np, sys; from serve.tracking import Detections, Tracker\n"
        "Tracker().update(Detections(np.ones((1, 4)), np.ones(1), np.zeros(1, int)))\n"
        "print({'matplotlib', 'av', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
