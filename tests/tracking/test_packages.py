"""Packages that tracks need, where they are not installed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from serve.errors import MissingPackage
from serve.tracking import Detections, Tracker


def test_images_without_trackers_are_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingPackage, match=r"trackers.*tracks\.lock"):
        Tracker().update(Detections(np.ones((1, 4)), np.ones(1), np.zeros(1, np.int64)))


def test_boxes_in_space_need_no_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None)
    boxes = np.array([[10, 0, -1.7, 4, 1.6, 1.5, 0]])
    assert Tracker().update(Detections(boxes, np.ones(1), np.zeros(1, np.int64))).tolist() == [1]
