"""Hostile and damaged checkpoints: each gives weights or a `CheckpointError`, in bounded memory."""

from __future__ import annotations

import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from serve.convert.checkpoint import load_checkpoint
from serve.errors import CheckpointError

WEIGHTS = {"conv.weight": torch.arange(24.0).reshape(2, 3, 4), "conv.bias": torch.ones(2)}


def rewritten(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """Write a checkpoint's zip anew, each entry changed."""
    with zipfile.ZipFile(path) as opened:
        entries = {name: opened.read(name) for name in opened.namelist()}
    with zipfile.ZipFile(path, "w", method) as out:
        for name, data in entries.items():
            out.writestr(name, change(name, data))
    return path


def saved(path: Path, content: object = None, *, zipped: bool = True) -> Path:
    torch.save(
        {"state_dict": WEIGHTS} if content is None else content, path, _use_new_zipfile_serialization=zipped
    )
    return path


def compressed(path: Path) -> None:
    rewritten(
        saved(path),
        lambda name, data: bytes(64 << 20) if name.endswith("/data/0") else data,
        zipfile.ZIP_DEFLATED,
    )


def many_lists(path: Path) -> None:
    bomb = b"\x80\x02" + b"]" * 3_000_000 + b"."
    rewritten(saved(path), lambda name, data: bomb if name.endswith("data.pkl") else data)


def many_lists_of_an_old_file(path: Path) -> None:
    path.write_bytes(b"\x80\x02" + b"]" * 3_000_000 + b".")


def expanded(path: Path) -> None:
    saved(path, {"state_dict": {**WEIGHTS, "huge": torch.zeros(1).expand(1 << 34)}})


def sparse_tensor(index: int, size: int) -> torch.Tensor:
    places = torch.full((2, 1), index, dtype=torch.long)
    return torch.sparse_coo_tensor(places, torch.ones(1), (size, size), check_invariants=False)


def sparse_beyond_its_shape(path: Path) -> None:
    saved(path, {"state_dict": {**WEIGHTS, "wild": sparse_tensor(1 << 40, 4)}})


def sparse(path: Path) -> None:
    huge = sparse_tensor(0, 1 << 20)
    saved(path, {"state_dict": {**WEIGHTS, "huge": huge}})


BOMBS = {
    "compressed entry": compressed,
    "a list per byte": many_lists,
    "a list per byte, without a zip": many_lists_of_an_old_file,
    "view that repeats one value": expanded,
    "sparse tensor that writes beyond its shape": sparse_beyond_its_shape,
    "sparse tensor of a huge shape": sparse,
}


@pytest.mark.parametrize("write", BOMBS.values(), ids=BOMBS.keys())
def test_checkpoint_made_to_take_memory_is_refused_in_little(tmp_path, monkeypatch, write):
    monkeypatch.setattr("serve.convert.pickle_size.MAX_OPCODES", 100_000)
    path = tmp_path / "hostile.pth"
    write(path)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size + (32 << 20)
    finally:
        tracemalloc.stop()


def test_meta_that_repeats_one_list_many_times_becomes_short(tmp_path):
    """A list of two lists of two lists …: a few bytes of pickle, 2 to the 24th values."""
    part: list[object] = ["x"]
    for _ in range(24):
        part = [part, part, part, part]
    path = saved(
        tmp_path / "laughs.pth", {"state_dict": WEIGHTS, "meta": {"classes": ["Car"], "laughs": part}}
    )
    found = load_checkpoint(path)
    assert found.classes == ("Car",) and len(pickle.dumps(found.meta)) < 16 << 20


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, bytes]:
    """Checkpoints by file name: zip, the format before it, safetensors."""
    folder = tmp_path_factory.mktemp("sound")
    saved(folder / "new.pth")
    saved(folder / "old.pth", zipped=False)
    save_file(WEIGHTS, folder / "weights.safetensors", metadata={"classes": '["Car"]'})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@seed(14)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("name", ["new.pth", "old.pth", "weights.safetensors"])
def test_checkpoint_with_any_damage_gives_weights_or_our_error(sound, tmp_path_factory, name, data):
    raw = sound[name]
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, min(len(raw), start + 64)))
    instead = data.draw(st.binary(max_size=16) | st.just(b"\xff" * (end - start)) | st.just(raw[:64]))
    path = tmp_path_factory.mktemp("damage") / name
    path.write_bytes(raw[:start] + instead + raw[end:])
    try:
        found = load_checkpoint(path)
    except CheckpointError as error:
        assert 10 < len(str(error)) < 2000
    else:
        assert all(tensor.numel() <= 24 * 100 for tensor in found.state_dict.values())
