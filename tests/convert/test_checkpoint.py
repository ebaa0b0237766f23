"""Reading checkpoints as data (`serve.convert.checkpoint`)."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import json
import pathlib
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file
from torch import nn

from serve.convert.checkpoint import load_checkpoint
from serve.convert.legacy_weights import adapt_and_load, compare_keys, shapes_of, versions_of
from serve.convert.safe_globals import safe_globals_for_openmmlab
from serve.errors import CheckpointError


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def runner_like(net: nn.Module) -> dict[str, Any]:
    """What mmengine 0.10's Runner.save_checkpoint writes, and some more that hooks and users add."""
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer
    from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

    history = HistoryBuffer()
    for step in range(20):
        history.update(step / 7)
    older = HistoryBuffer()
    older.__dict__["_statistics_methods"] = {"min": HistoryBuffer.min, "mean": HistoryBuffer.mean}
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.zeros(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    return {
        "meta": {
            "epoch": 80,
            "iter": 37120,
            "cfg": "model = dict(type='VoxelNet')\n",
            "dataset_meta": ConfigDict(classes=("Pedestrian", "Car"), palette=[(106, 0, 228), (0, 0, 142)]),
            "seed": np.int64(1997),
            "experiment_name": "second_20230101",
            "time": "20230101_000000",
            "mmengine_version": "0.10.7",
            "best": np.float32(0.5),
            "worst": float("nan"),
            "thresholds": np.arange(6, dtype=">f8").reshape(2, 3).T,
            "names": np.array(["a", "bcd"]),
            "when": datetime.datetime(2023, 1, 2, tzinfo=datetime.UTC),
            "work_dir": pathlib.PurePosixPath("/work/dirs"),
            "flags": frozenset({1, 2}),
            "window": slice(1, None, 2),
        },
        "state_dict": net.state_dict(),
        "message_hub": {
            "log_scalars": collections.OrderedDict({"train/loss": history, "train/lr": older}),
            "runtime_info": collections.OrderedDict(
                best_score=np.float64(0.3), last_ckpt="/x/y.pth", step=np.int64(3)
            ),
            "resumed_keys": collections.OrderedDict(train=True),
        },
        "optimizer": optimizer.state_dict(),
        "param_schedulers": [
            {"last_step": 3, "_last_lr": [0.001], "T_max": 10},
            {"last_step": 3, "anneal_func": OneCycleParamScheduler._annealing_cos},
        ],
        "ema_state_dict": {"steps": torch.tensor(3), "module.0.weight": net.state_dict()["0.weight"]},
        "counts": collections.defaultdict(list, {"a": [1]}),
        "args": argparse.Namespace(lr=0.1),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-torch-1.6"])
def test_runner_checkpoint_loads_without_trust(tmp_path: Path, zipped: bool) -> None:
    net = small_net()
    written = runner_like(net)
    torch.save(written, tmp_path / "epoch_80.pth", _use_new_zipfile_serialization=zipped)
    found = load_checkpoint(tmp_path / "epoch_80.pth")
    assert found.classes == ("Pedestrian", "Car")
    for name, value in net.state_dict().items():
        assert torch.equal(found.state_dict[name], value)
    assert list(found.state_dict) == list(net.state_dict())
    assert found.dropped == (
        *("args", "counts", "ema_state_dict", "message_hub", "optimizer", "param_schedulers"),
    )
    meta = json.loads(json.dumps(found.meta, allow_nan=False))
    assert meta == found.meta
    assert (meta["seed"], meta["best"], meta["worst"]) == (1997, 0.5, "nan")
    assert meta["thresholds"] == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert meta["names"] == ["a", "bcd"]
    assert meta["work_dir"] == "/work/dirs"
    assert meta["flags"] == [1, 2]
    assert meta["when"].startswith("2023-01-02")


def test_mmengine_loader_reads_runner_checkpoint_inside_safe_globals(tmp_path: Path) -> None:
    from mmengine.runner.checkpoint import load_checkpoint as load_with_mmengine

    net, path = small_net(), tmp_path / "epoch_80.pth"
    torch.save(runner_like(net), path)
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(pickle.UnpicklingError):  # mmengine's own, unless `serve.upstream.patches` are applied
        torch.load(path, map_location="cpu", weights_only=True)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with safe_globals_for_openmmlab(), safe_globals_for_openmmlab():
        read = load_with_mmengine(other, str(path), map_location="cpu", strict=True)
    assert torch.equal(other[0].weight, net[0].weight)
    assert read["meta"]["dataset_meta"] == {
        "classes": ("Pedestrian", "Car"),
        "palette": [(106, 0, 228), (0, 0, 142)],
    }
    assert set(torch.serialization.get_safe_globals()) == before


def test_safe_globals_keeps_names_allowed_elsewhere(tmp_path: Path) -> None:
    with torch.serialization.safe_globals([functools.partial]):
        with pytest.raises(ZeroDivisionError), safe_globals_for_openmmlab():
            raise ZeroDivisionError
        assert functools.partial in torch.serialization.get_safe_globals()


def save_meta(folder: Path, dataset_meta: Any) -> Path:
    torch.save(
        {"state_dict": small_net().state_dict(), "meta": {"dataset_meta": dataset_meta}}, folder / "a.pth"
    )
    return folder / "a.pth"


def test_own_names_in_capitals_go_before_those_of_the_data_set_type_as_upstream(tmp_path: Path) -> None:
    meta = {"classes": tuple(map(str, range(80))), "CLASSES": ("cat", "dog")}  # as a CocoDataset records it
    assert load_checkpoint(save_meta(tmp_path, meta)).classes == ("cat", "dog")


@pytest.mark.parametrize("named", [{0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}, np.array(["cat", "dog"])])
def test_classes_of_every_form_are_read(tmp_path: Path, named: Any) -> None:
    assert load_checkpoint(save_meta(tmp_path, {"classes": named})).classes == ("cat", "dog")


@pytest.mark.parametrize("named", ["data/classes.txt", "names.txt", 7, [["cat"]], {"cat": 5}])
def test_classes_in_another_form_are_refused_and_never_guessed(tmp_path: Path, named: Any) -> None:
    with pytest.raises(CheckpointError, match="--classes"):
        _ = load_checkpoint(save_meta(tmp_path, {"classes": named})).classes


def test_a_checkpoint_with_averaged_weights_only_is_read(tmp_path: Path) -> None:
    weights = small_net().state_dict()
    averaged = {f"module.{name}": value for name, value in weights.items()} | {"steps": torch.tensor(3)}
    torch.save({"ema_state_dict": averaged, "meta": {}}, tmp_path / "a.pth")
    found = load_checkpoint(tmp_path / "a.pth")
    assert set(found.state_dict) == set(weights) and any("ema_state_dict" in note for note in found.notes)


def test_pre_1_0_meta_gives_classes(tmp_path: Path) -> None:
    meta = {
        "env_info": "sys.platform: linux\nGPU 0: TITAN Xp",
        "config": "model = dict(type='VoxelNet')",
        "mmdet_version": "2.3.0",
        "mmdet3d_version": "0.5.0+be4d9f0",
        "CLASSES": ("Car",),
        "PALETTE": None,
        "hook_msgs": {"best_score": np.float64(0.4)},
    }
    torch.save({"meta": meta, "state_dict": small_net().state_dict(), "optimizer": {}}, tmp_path / "old.pth")
    found = load_checkpoint(tmp_path / "old.pth")
    assert found.classes == ("Car",)


@pytest.mark.parametrize(
    ("meta", "classes"),
    [
        ({"dataset_meta": {"CLASSES": ["a", "b"]}}, ("a", "b")),
        ({"dataset_meta": {"classes": "car"}}, ("car",)),
        ({"dataset_meta": {}, "CLASSES": ("x",)}, ("x",)),
        ({"CLASSES": None}, None),
        ({}, None),
    ],
)
def test_classes_are_read_from_every_known_key(
    tmp_path: Path, meta: dict[str, Any], classes: tuple[str, ...] | None
) -> None:
    torch.save({"meta": meta, "state_dict": small_net().state_dict()}, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth").classes == classes


# --- refused ----------------------------------------------------------------------------------------------


class Touches:
    """Unpickling it creates a file: what a malicious checkpoint would do."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.made = (call, args)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.made


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["state_dict", "meta", "message_hub", "top"])
@pytest.mark.parametrize("how", ["subprocess", "path", "eval", "partial"])
def test_malicious_checkpoint_is_rejected_by_type_name_and_runs_nothing(
    tmp_path: Path, zipped: bool, where: str, how: str
) -> None:
    victim = tmp_path / "created"
    bomb = {
        "subprocess": Touches(subprocess.call, ["touch", str(victim)]),
        "path": Touches(pathlib.Path.touch, victim),
        "eval": Touches(eval, f"open({str(victim)!r}, 'w')"),
        "partial": Touches(functools.partial(open, victim, "w")),
    }[how]
    content: dict[str, Any] = {"state_dict": dict(small_net().state_dict()), "meta": {}, "message_hub": {}}
    (content if where == "top" else content[where])["bomb"] = bomb
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "evil.pth")
    assert not victim.exists()
    if how != "path":  # a method is pickled as getattr, whose stand-in gets nothing to call
        name = {"subprocess": ".call", "eval": "eval", "partial": "functools.partial"}[how]
        assert name in str(caught.value)
        assert "--trust-checkpoint" in str(caught.value)


def test_trusted_checkpoint_loads_any_type(tmp_path: Path) -> None:
    victim = tmp_path / "created"
    torch.save({"state_dict": small_net().state_dict(), "x": Touches(open, victim, "w")}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="trust-checkpoint"):
        load_checkpoint(tmp_path / "a.pth")
    assert not victim.exists()
    torch.save({"state_dict": small_net().state_dict(), "x": Touches(victim.mkdir)}, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth", trust=True).dropped == ("x",)
    assert victim.exists()


def test_pickled_model_is_rejected_by_its_module_types(tmp_path: Path) -> None:
    torch.save(small_net(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules.*state_dict\(\)"):
        load_checkpoint(tmp_path / "model.pth")


def test_object_and_structured_arrays_are_rejected(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": small_net().state_dict(), "x": np.array([[], None], dtype=object)}, tmp_path / "o.pth"
    )
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "o.pth")
    structured = np.zeros(2, dtype=[("a", "f4"), ("b", "i4")])
    torch.save({"state_dict": small_net().state_dict(), "x": structured}, tmp_path / "s.pth")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "s.pth")


@given(
    array=hnp.arrays(
        hnp.scalar_dtypes().filter(lambda kind: kind.kind in "biufSU"), hnp.array_shapes(max_side=4)
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_number_and_text_arrays_round_trip(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    torch.save({"state_dict": {"w": torch.zeros(1)}, "a": array, "s": array.flat[0]}, tmp_path / "a.pth")
    with safe_globals_for_openmmlab():
        read = torch.load(tmp_path / "a.pth", weights_only=True)
    for found, wrote in ((read["a"], array), (read["s"], array.flat[0])):
        np.testing.assert_array_equal(np.asarray(found), wrote)
        assert found.dtype == wrote.dtype or found.dtype == wrote.dtype.newbyteorder("=")


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\x80\x02}q\x00.", "damaged"),
        (b"not a checkpoint at all", "damaged"),
        (b"PK\x03\x04 but not a zip", "damaged"),
    ],
)
def test_file_that_is_not_a_checkpoint_raises_checkpoint_error(
    tmp_path: Path, content: bytes, hint: str
) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=hint):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("keep", [10, 500, 0.5, 0.99])
def test_truncated_checkpoint_raises_checkpoint_error(tmp_path: Path, keep: float) -> None:
    torch.save({"state_dict": small_net().state_dict()}, tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "a.pth")


def test_missing_file_folder_and_foreign_zip_raise_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth"):
        load_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "content", [[1, 2], {"meta": {}}, {"state_dict": {}}, {"a": 1, "b": torch.zeros(1), "c": 2}]
)
def test_checkpoint_without_weights_is_rejected(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "a.pth")


def test_multi_disk_zip_raises_checkpoint_error(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(4)}, tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    head, locator, end = data.rpartition(b"PK\x06\x07")
    assert locator
    (tmp_path / "b.pth").write_bytes(head + locator + end[:12] + (2).to_bytes(4, "little") + end[16:])
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "b.pth")


@given(junk=st.binary(max_size=200), at=st.integers(0, 3000))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_give_weights_or_checkpoint_error(tmp_path: Path, junk: bytes, at: int) -> None:
    torch.save({"state_dict": {"w": torch.ones(4)}, "meta": {"a": 1}}, tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    data[at : at + len(junk)] = junk
    (tmp_path / "b.pth").write_bytes(bytes(data))
    try:
        load_checkpoint(tmp_path / "b.pth")
    except CheckpointError:
        return


# --- other forms of the same weights ----------------------------------------------------------------------


def test_bare_ddp_and_safetensors_checkpoints_load_alike(tmp_path: Path) -> None:
    net = small_net()
    weights = net.state_dict()
    torch.save(weights, tmp_path / "bare.pth")
    torch.save({"model": nn.ModuleDict({"module": net}).state_dict(), "iteration": 3}, tmp_path / "ddp.pth")
    save_file(dict(weights), tmp_path / "a.safetensors", metadata={"CLASSES": '["Car"]', "by": "me"})
    for name in ("bare.pth", "ddp.pth", "a.safetensors"):
        found = load_checkpoint(tmp_path / name)
        assert compare_keys(found.state_dict, shapes_of(net)).ok
        adapt_and_load(small_net(), found)
    assert load_checkpoint(tmp_path / "a.safetensors").classes == ("Car",)
    assert load_checkpoint(tmp_path / "ddp.pth").versions == versions_of(net)
    assert "module." in load_checkpoint(tmp_path / "ddp.pth").notes[0]


def test_damaged_safetensors_raises_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "a.safetensors")


def test_ema_buffers_in_the_model_are_dropped(tmp_path: Path) -> None:
    weights = dict(small_net().state_dict())
    doubled = weights | {f"ema_{name.replace('.', '_')}": value for name, value in weights.items()}
    doubled["ema_of_my_own"] = torch.zeros(1)
    torch.save({"state_dict": doubled}, tmp_path / "a.pth")
    assert set(load_checkpoint(tmp_path / "a.pth").state_dict) == {*weights, "ema_of_my_own"}


def test_parameters_and_arrays_are_kept_and_other_entries_dropped(tmp_path: Path) -> None:
    content = {"a": nn.Parameter(torch.ones(2)), "b": np.ones(3, np.float32), "c": "text", "d": 5}
    torch.save({"state_dict": content}, tmp_path / "a.pth")
    found = load_checkpoint(tmp_path / "a.pth")
    assert {name: tuple(value.shape) for name, value in found.state_dict.items()} == {"a": (2,), "b": (3,)}
    assert not found.state_dict["a"].requires_grad
    assert len(found.notes) == 1 and "c, d" in found.notes[0]


def test_self_referring_meta_becomes_finite_json(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    torch.save({"state_dict": small_net().state_dict(), "meta": {"loop": loop}}, tmp_path / "a.pth")
    json.dumps(load_checkpoint(tmp_path / "a.pth").meta)


def test_loading_imports_neither_mmengine_nor_mmdet(tmp_path: Path) -> None:
    torch.save(runner_like(small_net()), tmp_path / "a.pth")
    script = (
        "import sys; from serve.convert.checkpoint import load_checkpoint;"
        "print(load_checkpoint(sys.argv[1]).classes, 'mmengine' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script, str(tmp_path / "a.pth")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "('Pedestrian', 'Car') False"
