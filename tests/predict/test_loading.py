"""Models by name: archives are made once, as `archive` makes them, and anew when anything changes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.errors import ModelLookupError, ObjectNotFound, SettingsError
from serve.predict import load_model, predict
from tests.conftest import ASSETS, DEMO_CHECKPOINT, DEMO_CONFIG
from tests.e2e.small_models import write

MADE = "running the golden frame"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMDET3D_SERVE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_the_archive_of_a_config_is_kept_until_something_changes(demo_mar: Path, own_cache: Path) -> None:
    steps: list[str] = []
    with load_model(DEMO_CONFIG, DEMO_CHECKPOINT, device="cpu", report=steps.append) as model:
        (first,) = predict(ASSETS / "sample.bin", model)
    assert MADE in steps
    steps.clear()
    with load_model(DEMO_CONFIG, DEMO_CHECKPOINT, device="cpu", report=steps.append) as model:
        (second,) = predict(ASSETS / "sample.bin", model)
    assert MADE not in steps
    assert first.encoded.replace(b"second_demo", b"") == second.encoded.replace(b"second_demo", b"")
    steps.clear()
    names = ("a", "b", "c")
    with load_model(DEMO_CONFIG, DEMO_CHECKPOINT, device="cpu", classes=names, report=steps.append) as model:
        assert model.detector.metadata.classes == names
    assert MADE in steps


@pytest.mark.slow
def test_a_model_without_weights_can_be_tried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    config, _ = write("rtmdet", tmp_path)
    with load_model(config, random_weights=True, device="cpu") as model:
        assert model.modality == "image"


@pytest.mark.parametrize(
    ("load", "kind"),
    [
        (lambda: load_model("no-such-model"), ModelLookupError),
        (lambda: load_model("missing.mar"), ObjectNotFound),
        (lambda: load_model("x.mar", "x.pth"), SettingsError),
        (lambda: load_model("second", "x.pth", random_weights=True), SettingsError),
        (lambda: load_model(DEMO_CONFIG, "missing.pth"), ObjectNotFound),
    ],
)
def test_what_cannot_be_loaded_is_an_error(load: Callable[[], object], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        load()
