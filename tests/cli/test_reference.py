"""``mmdet3d-serve reference``: counts of a model on frames, in its archive, which is served as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from serve import archive
from serve.cli import reference
from serve.errors import SettingsError
from serve.watch.reference import ENTRY
from serve.watch.statistics import CLASS


@pytest.mark.slow
def test_reference_is_recorded_in_the_archive_and_bad_frames_are_left_out(
    demo_mar: Path, street: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = tmp_path / "velodyne"
    frames.mkdir()
    for k in range(3):
        street.tofile(frames / f"{k}.bin")
    (frames / "3.bin").write_bytes(b"odd")
    out = tmp_path / "watched.mar"
    assert reference.main([str(demo_mar), str(frames), "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "3 frames" in printed.out and "3.bin is left out" in printed.err
    metadata = archive.verify(out)
    before = archive.verify(demo_mar)
    assert ENTRY in metadata.files and ENTRY not in before.files
    assert {name: sha for name, sha in metadata.files.items() if name != ENTRY} == before.files
    found = archive.extract(out, tmp_path / "opened").reference()
    assert found is not None and found.counts.frames == 3 and found.counts.of("points").sum() == 3
    assert (
        found.counts.of(CLASS).sum() > 0 and archive.extract(demo_mar, tmp_path / "old").reference() is None
    )
    # Again, in place: the same bytes, because the same frames give the same counts.
    again = tmp_path / "again.mar"
    assert reference.main([str(out), str(frames), "--out", str(again), "--device", "cpu"]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_an_archive_that_is_missing_is_an_error_of_usage(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        reference.main([str(tmp_path / "none.mar"), str(tmp_path)])
