"""A golden frame on which nothing is found proves nothing: the archive is written, and the exit code is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve import archive
from serve.cli.archive import NOTHING_PROVED, main
from tests.e2e.small_models import write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def find_nothing(config: Any) -> None:
    """Ask for scores that no detection has."""
    settings = config.model.test_cfg
    for part in [settings, *(value for value in settings.values() if isinstance(value, dict))]:
        if "score_thr" in part:
            part["score_thr"] = 1.5


@pytest.mark.parametrize(
    "kind",
    [
        "one-stage",
        "pillars",
        *(
            pytest.param(kind, marks=pytest.mark.soak)
            for kind in ("mask", "mono3d", "multiview", "fusion", "depth")
        ),
    ],
)
def test_frame_without_detections_has_its_own_exit_code(kind: str, tmp_path: Path, capsys: Any) -> None:
    config, checkpoint = write(kind, tmp_path, find_nothing)
    store = tmp_path / "store"
    arguments = [str(config), "--checkpoint", str(checkpoint), "--output-folder", str(store)]
    assert main([*arguments, "--model-name", "blind"]) == NOTHING_PROVED
    assert "nothing is proved" in capsys.readouterr().out
    opened = archive.extract(store / "blind.mar", tmp_path / "opened")
    assert opened.golden_expected()["names"] == []


def test_cloud_without_points_to_label_has_its_own_exit_code(tmp_path: Path, capsys: Any) -> None:
    config, checkpoint = write("segments", tmp_path)
    (tmp_path / "empty.bin").write_bytes(b"")
    arguments = [str(config), "--checkpoint", str(checkpoint), "--output-folder", str(tmp_path / "store")]
    arguments += ["--model-name", "blind", "--golden-frame", str(tmp_path / "empty.bin")]
    assert main(arguments) == NOTHING_PROVED
    assert "nothing is proved" in capsys.readouterr().out
