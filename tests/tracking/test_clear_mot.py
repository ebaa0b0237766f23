"""CLEAR MOT counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from serve.tracking.clear_mot import ClearMot


def count(*frames: tuple[dict[int, float], dict[int, float]]) -> ClearMot:
    """Each frame: places of objects and of tracks on a line."""
    score = ClearMot(reach=1.0)
    for objects, tracks in frames:
        score.update(
            np.array(list(objects), np.int64),
            np.array(list(objects.values()), np.float64).reshape(-1, 1),
            np.array(list(tracks), np.int64),
            np.array(list(tracks.values()), np.float64).reshape(-1, 1),
        )
    return score


def test_perfect_tracks_have_mota_1() -> None:
    score = count(({0: 0.0, 1: 5.0}, {7: 0.5, 8: 5.0}), ({0: 1.0, 1: 6.0}, {7: 1.0, 8: 6.0}))
    assert (score.mota, score.switches, score.misses, score.false_tracks) == (1.0, 0, 0, 0)
    assert score.motp == pytest.approx(0.125)


def test_misses_false_tracks_and_switches_are_counted() -> None:
    score = count(
        ({0: 0.0, 1: 5.0}, {7: 0.0}),  # object 1 missed
        ({0: 0.0, 1: 5.0}, {7: 0.0, 8: 5.0, 9: 20.0}),  # track 9 false
        ({0: 0.0, 1: 5.0}, {6: 0.0, 8: 5.0}),  # object 0 switches
    )
    assert (score.objects, score.misses, score.false_tracks, score.switches) == (6, 1, 1, 1)
    assert score.mota == pytest.approx(1 - 3 / 6)


def test_an_object_keeps_its_track_though_another_is_nearer() -> None:
    score = count(({0: 0.0}, {7: 0.0}), ({0: 0.0}, {7: 0.9, 8: 0.0}))
    assert (score.switches, score.false_tracks) == (0, 1)


def test_a_switch_is_seen_across_a_gap_and_counted_as_a_fragment() -> None:
    score = count(({0: 0.0}, {7: 0.0}), ({0: 0.0}, {}), ({0: 0.0}, {8: 0.0}))
    assert (score.switches, score.fragments, score.misses) == (1, 1, 1)


def test_empty_frames_count_nothing() -> None:
    score = count(({}, {}))
    assert score.objects == 0 and np.isnan(score.mota) and np.isnan(score.motp)
