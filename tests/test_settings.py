"""Settings: read once, wrong ones stop the start with a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from serve.errors import SettingsError
from serve.settings import Settings


def test_defaults_need_no_environment():
    settings = Settings.from_environment({"PATH": "/bin"})
    assert settings == Settings() and settings.limits.max_points == settings.max_points


def test_values_are_read_and_typed():
    settings = Settings.from_environment(
        {
            "MMDET3D_SERVE_OPS": "portable",
            "MMDET3D_SERVE_TRUST_ARCHIVE_CODE": "1",
            "MMDET3D_SERVE_MAX_POINTS": "1000",
            "MMDET3D_SERVE_CACHE_DIR": "/tmp/x",
        }
    )
    assert settings == Settings(
        ops="portable", trust_archive_code=True, max_points=1000, cache_dir=Path("/tmp/x")
    )
    with pytest.raises(FrozenInstanceError):
        settings.max_points = 1


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("MMDET3D_SERVE_MAX_POINT", "3", "did you mean MMDET3D_SERVE_MAX_POINTS"),
        ("MMDET3D_SERVE_ZZZ", "3", "known: "),
        ("MMDET3D_SERVE_MAX_POINTS", "0", "1 or more"),
        ("MMDET3D_SERVE_MAX_POINTS", "many", "whole number"),
        ("MMDET3D_SERVE_OPS", "fast", "auto or portable"),
        ("MMDET3D_SERVE_TRUST_ARCHIVE_CODE", "perhaps", "1 or 0"),
    ],
)
def test_a_wrong_setting_says_what_to_change(variable, value, says):
    with pytest.raises(SettingsError, match=says):
        Settings.from_environment({variable: value})


def test_a_wrong_setting_stops_every_command_with_a_sentence():
    done = subprocess.run(
        [sys.executable, "tools/archive.py", "--list", "second"],
        env={**os.environ, "MMDET3D_SERVE_OPS": "fast"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: MMDET3D_SERVE_OPS='fast'")
