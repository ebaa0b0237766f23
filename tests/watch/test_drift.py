"""Distance of histograms, and how rarely chance alone passes the limit."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import ArchiveError
from serve.watch.drift import FLOOR, chance_limit, distance, distances
from serve.watch.reference import Recording, Reference, reference_of
from serve.watch.statistics import CLASS, SEGMENT, Layout

HISTOGRAMS = st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any)


@given(HISTOGRAMS, HISTOGRAMS)
@settings(deadline=None, max_examples=50)
def test_distance_is_scipys_and_a_metric(one: list[int], other: list[int]) -> None:
    from scipy.spatial.distance import jensenshannon

    found = distance(np.array(one), np.array(other))
    assert found is not None and 0 <= found <= 1
    assert found == pytest.approx(np.nan_to_num(jensenshannon(one, other, base=2)), abs=1e-7)
    assert found == pytest.approx(distance(np.array(other), np.array(one)), abs=1e-7)
    assert distance(np.array(one), 3 * np.array(one)) == pytest.approx(0, abs=1e-7)


def test_nothing_in_common_is_one_and_nothing_at_all_has_no_distance() -> None:
    assert distance(np.array([3, 0]), np.array([0, 9])) == pytest.approx(1)
    assert distance(np.array([0, 0]), np.array([0, 9])) is None


def test_histograms_in_one_array_have_the_distances_that_each_has_alone() -> None:
    one, other = np.array([3, 0, 0, 0, 1, 2, 5]), np.array([0, 9, 4, 4, 2, 2, 0])
    found = distances(one, other, [0, 2, 4])
    assert np.isnan(found[1])
    assert found[[0, 2]].tolist() == [distance(one[:2], other[:2]), distance(one[4:], other[4:])]


def _frames(rng: np.random.Generator, number: int, of_frame: int, shares: list[float]) -> np.ndarray:
    return np.array([rng.multinomial(rng.poisson(of_frame), shares) for _ in range(number)])


@pytest.mark.parametrize(("frames", "of_frame"), [(1000, 20), (300, 5), (100, 1)])
def test_windows_of_the_same_source_hardly_pass_the_limit_and_another_source_does(
    frames: int, of_frame: int
) -> None:
    rng = np.random.default_rng(0)
    shares = [0.4, 0.3, 0.2, 0.1]
    blocks = _frames(rng, frames, of_frame, shares)
    limit, reference = chance_limit(blocks, 200), blocks.sum(0)
    same = [distance(_frames(rng, 200, of_frame, shares).sum(0), reference) for _ in range(300)]
    assert sum(found is not None and found > limit for found in same) <= 1
    other = distance(_frames(rng, 200, of_frame, [0.1, 0.2, 0.3, 0.4]).sum(0), reference)
    assert other is not None and other > limit >= FLOOR


@pytest.mark.parametrize("number", [1, 2, 3, 5, 20])
def test_windows_of_the_same_source_do_not_pass_the_limit_of_few_frames(number: int) -> None:
    rng = np.random.default_rng(0)

    def frames(count: int) -> np.ndarray:
        return np.array([rng.multinomial(10, rng.dirichlet([3.0, 2.0, 2.0, 1.0])) for _ in range(count)])

    blocks = frames(number)
    limit, reference = chance_limit(blocks, 200), blocks.sum(0)
    found = [distance(frames(200).sum(0), reference) for _ in range(20)]
    assert not any(each is not None and each > limit for each in found)


def test_frames_that_resemble_their_neighbours_have_a_wider_limit() -> None:
    rng = np.random.default_rng(0)
    scenes = np.array([rng.dirichlet(np.ones(6)) for _ in range(40)])
    slow = np.array([rng.multinomial(20, scenes[k // 25]) for k in range(1000)])
    assert chance_limit(slow, 200) > 1.3 * chance_limit(rng.permutation(slow), 200)


def test_a_limit_of_many_frames_needs_little_memory() -> None:
    blocks = np.tile(np.eye(4, dtype=np.int64), (500, 1))
    tracemalloc.start()
    chance_limit(blocks, 200)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20


def test_values_too_rare_to_compare_never_pass() -> None:
    blocks = np.zeros((100, 3), int)
    blocks[7, 1] = 1
    assert chance_limit(blocks, 50) == pytest.approx(FLOOR) or chance_limit(blocks, 50) <= 1
    assert chance_limit(np.zeros((100, 3), int), 50) == 1


def _reference() -> Reference:
    layout = Layout.of_classes(("Car", "Cyclist"))
    blocks = []
    for k in range(50):
        counts = layout.empty()
        counts.frames = 1
        counts.add_values("score", np.array([0.3 + 0.01 * k, 0.8]))
        counts.of(CLASS)[k % 2] += 1
        blocks.append(counts)
    return reference_of(blocks, 0.4, 20)


def test_a_reference_is_read_as_it_was_written() -> None:
    reference = _reference()
    again = Reference.parse(reference.document())
    assert (again.counts.bins == reference.counts.bins).all() and again.counts.frames == 50
    assert again.limits == reference.limits and again.limits.keys() == {"score", CLASS}
    assert again.score_thr == 0.4 and again.counts.layout == reference.counts.layout
    assert again.recording is None  # as of an archive that was recorded before there was one
    recording = Recording("2026-11-28T20:00:00+00:00", "s3://bucket/val", 200)
    document = replace(reference, recording=recording).document()
    assert Reference.parse(document).recording == recording
    assert reference.document() == {name: each for name, each in document.items() if name != "recording"}


def test_shares_of_segments_are_read_as_they_were_written_and_have_a_limit() -> None:
    layout = Layout.of_classes(("road", "car"))
    blocks = []
    for k in range(50):
        counts = layout.empty()
        counts.frames = 1
        counts.of(SEGMENT)[:] = (1000 + 10 * k, 300, 7)
        blocks.append(counts)
    reference = reference_of(blocks, 0.3, 20)
    again = Reference.parse(reference.document())
    assert again.limits == reference.limits == {SEGMENT: FLOOR}
    assert (again.counts.bins == reference.counts.bins).all()


def test_a_statistic_with_bins_of_another_version_is_left_out() -> None:
    document = _reference().document()
    document["statistics"]["score"]["edges"][0] = 0.01
    document["statistics"]["later"] = {"edges": [1.0], "counts": [1, 2], "limit": 0.1}
    assert Reference.parse(document).limits.keys() == {CLASS}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2}, {"frames": 0}, {"frames": "5"}, {"score_thr": 2}, {"statistics": {"score": {}}}, {"more": 1},
        {"classes": {"names": ["a"], "counts": [1], "limit": 0.1}},
        {"classes": {"names": ["a"], "counts": [1, -1], "limit": 0.1}},
        {"classes": {"names": ["a", "a"], "counts": [1, 1, 1], "limit": 0.1}},
        {"classes": {"names": ["(other)"], "counts": [1, 1], "limit": 0.1}},
        {"segments": {"counts": [1], "limit": 0.1}}, {"segments": {"counts": [1, 2, -3], "limit": 0.1}},
        {"recording": {"time": "now"}}, {"recording": {"time": "t", "source": "s", "window_frames": 0}},
    ],
)  # fmt: skip
def test_a_malformed_reference_is_an_error(change: dict[str, object]) -> None:
    with pytest.raises(ArchiveError):
        Reference.parse({**_reference().document(), **change})


def test_counts_of_another_number_than_bins_are_an_error() -> None:
    document = _reference().document()
    for wrong in (document["statistics"]["score"]["counts"][:-1], [5]):
        document["statistics"]["score"]["counts"] = wrong
        with pytest.raises(ArchiveError):
            Reference.parse(document)
