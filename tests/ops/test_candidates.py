"""The best scores are those of a stable sort of all sigmoids, with the same bits, in the same order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops.cpu.candidates import select_best


def expected(logits: torch.Tensor, threshold: float, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    # torch computes what does not fill a vector by another function, whose last bit may differ.
    scores = torch.nn.functional.pad(logits, (0, -len(logits) % 64)).sigmoid()[: len(logits)]
    above = (scores > threshold).nonzero()[:, 0]
    scores, order = scores[above].sort(descending=True, stable=True)
    return scores[:count], above[order[:count]]


def check(logits: torch.Tensor, threshold: float, count: int) -> None:
    scores, index = select_best(logits, threshold, count)
    wanted, places = expected(logits, threshold, count)
    assert scores.numpy().tobytes() == wanted.numpy().tobytes()
    assert torch.equal(index, places)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from([1, 2, 63, 64, 65, 5000, 70000]),
    spread=st.sampled_from([0.0, 1e-6, 0.1, 3.0, 40.0]),
    middle=st.sampled_from([-6.0, 0.0, 16.0]),
    threshold=st.sampled_from([-1.0, 0.0, 0.001, 0.05, 0.5, 0.999999, 1.0]),
    count=st.sampled_from([0, 1, 7, 1000, 100000]),
)
def test_any_logits_are_selected_as_by_a_stable_sort(seed, size, spread, middle, threshold, count):
    noise = np.random.default_rng(seed).standard_normal(size)
    check(torch.from_numpy((middle + spread * noise).astype(np.float32)), threshold, count)


@pytest.mark.parametrize("order", ["ascending", "descending", "coarse", "saturated", "infinite"])
def test_order_and_ties_are_those_of_a_stable_sort(order):
    values = np.random.default_rng(0).standard_normal(20000).astype(np.float32)
    values = {
        "ascending": np.sort(values),
        "descending": np.sort(values)[::-1].copy(),
        "coarse": np.round(values * 2) / 2,
        "saturated": 30 + values,
        "infinite": np.where(values > 1, np.inf, np.where(values < -1, -np.inf, values)),
    }[order].astype(np.float32)
    check(torch.from_numpy(values), 0.05, 300)


def test_nan_is_no_candidate():
    logits = torch.tensor([0.0, float("nan"), 2.0])
    assert select_best(logits, 0.1, 3)[1].tolist() == [2, 0]


def test_scores_have_the_same_bits_with_any_number_of_threads():
    logits = torch.linspace(-6, 6, 100096)  # a third of them does not fill its vectors
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(select_best(logits, -1.0, len(logits)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
