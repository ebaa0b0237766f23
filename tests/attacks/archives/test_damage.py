"""Damage to every byte and every field of an archive: it is read as it was, or refused with an `ArchiveError`."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from serve import archive
from serve.archive import Metadata
from serve.errors import ArchiveError
from serve.torchserve.config import read_manifest
from tests.attacks.archives.small_archive import entries_of, pack, small_archive, with_fields

BOUNDED = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def read_whole(path: Path, root: Path) -> Metadata | None:
    """Read an archive in every way; returns None if all that failed did so with an `ArchiveError`."""
    found = None
    try:
        found = archive.verify(path)
        opened = archive.extract(path, root)
        opened.config()
        opened.golden_frame()
        opened.golden_expected()
    except ArchiveError as error:
        assert 10 < len(str(error)) < 1000
        json.dumps(str(error)).encode()
    try:
        read_manifest(path)
    except ArchiveError:
        assert found is None, "what can be served has a manifest that TorchServe can read"
    return found


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return small_archive(tmp_path_factory.mktemp("sound"), code={"mine.py": b"x = 1"}, extra={"a": b"1"})


@pytest.fixture
def spoiled(tmp_path) -> Path:
    return tmp_path / "small.mar"


def test_archive_with_a_bit_changed_is_read_as_it_was_or_refused(sound, spoiled):
    raw = sound.read_bytes()
    expected = archive.verify(sound)
    refused = 0
    for at in range(0, len(raw), 2):
        spoiled.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :])
        try:
            assert archive.verify(spoiled) == expected  # a bit of a date, say
        except ArchiveError:
            refused += 1
    assert refused > len(raw) // 4


@seed(14)
@BOUNDED
@given(data=st.data())
def test_archive_with_regions_replaced_is_refused_or_read(sound, tmp_path_factory, data):
    raw = sound.read_bytes()
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, min(len(raw), start + 200)))
    instead = data.draw(
        st.binary(max_size=60) | st.just(raw[start:end] * 2) | st.just(b"\xff" * (end - start))
    )
    folder = tmp_path_factory.mktemp("damage")
    path = folder / "small.mar"
    path.write_bytes(raw[:start] + instead + raw[end:])
    read_whole(path, folder / "opened")


def test_archive_cut_anywhere_is_refused(sound, spoiled):
    raw = sound.read_bytes()
    for length in range(0, len(raw), 7):
        spoiled.write_bytes(raw[:length])
        with pytest.raises(ArchiveError):
            archive.verify(spoiled)


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every value of a document."""
    yield path
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield from places(value, (*path, key))


WRONG = [
    *(None, True, 0, -1, 2**63, 10**400, 1e308, "", "x" * 100_000, "../x", "/etc/passwd", "\x00"),
    *([], {}, [[]], {"": {}}, {"__tuple__": 1}, {"__dict__": [[[], 1]]}, {"__set__": [{}]}, {"__float__": "x"}),
]  # fmt: skip


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    "entry", ["model.json", "MAR-INF/MANIFEST.json", "config.json", "golden/expected.json"]
)
def test_archive_with_any_field_replaced_is_refused_or_read(sound, tmp_path, entry):
    document = json.loads(entries_of(sound)[entry])
    count = 0
    for path in places(document):
        for wrong in WRONG:
            spoiled = pack(tmp_path / "small.mar", entries_of(sound))
            changed = replaced(document, path, wrong)

            def change(found: Any, changed: Any = changed) -> None:
                found.clear()
                found.update(changed)

            if isinstance(changed, dict):
                with_fields(spoiled, change, entry)
            else:
                pack(spoiled, {**entries_of(sound), entry: json.dumps(changed).encode()})
            read_whole(spoiled, tmp_path / f"opened-{count}")
            count += 1
    assert count >= len(WRONG)


@seed(14)
@BOUNDED
@given(
    body=st.binary(max_size=100)
    | st.sampled_from(
        [b"[" * 100_000, b'{"a":' * 5000, b"\xff\xfe{}", b'"\\ud800"', b"NaN", b"1e999", b"{}" * 2]
    )
)
@pytest.mark.parametrize(
    "entry", ["model.json", "MAR-INF/MANIFEST.json", "config.json", "golden/expected.json"]
)
def test_archive_with_any_bytes_as_a_document_is_refused(sound, tmp_path_factory, entry, body):
    folder = tmp_path_factory.mktemp("document")
    path = pack(folder / "small.mar", {**entries_of(sound), entry: body})
    assert read_whole(path, folder / "opened") is None
    with pytest.raises(ArchiveError):
        archive.verify(path)
