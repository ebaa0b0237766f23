"""The wheel has what the page needs, and not what it is built of."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

BUILT = Path(__file__).parents[2] / "serve" / "gateway" / "ui" / "built"


@pytest.mark.slow
def test_wheel_has_the_assets_of_the_page_and_not_their_sources(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folder = "serve/gateway/ui/"
    inside = {name.removeprefix(f"{folder}built/") for name in names if name.startswith(f"{folder}built/")}
    assert inside == {path.name for path in BUILT.iterdir()}
    assert not [name for name in names if name.startswith(f"{folder}source")]
