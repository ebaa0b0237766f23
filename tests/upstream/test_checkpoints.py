"""Whole checkpoints for mmengine's runner, read as data."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from serve.upstream.checkpoints import load_whole_checkpoint, trust_checkpoints


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("made-by-a-checkpoint",))


@pytest.fixture
def written(tmp_path):
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer(np.array([1.0, 2.0, 4.0]), np.array([1, 1, 2]), max_length=50)
    hub = {
        "log_scalars": {"train/loss": history},
        "runtime_info": {"epoch": 2},
        "resumed_keys": {"train/loss": True},
    }
    path = tmp_path / "epoch_2.pth"
    meta = {"epoch": 2, "iter": 8, "config": "raise SystemExit"}
    torch.save(
        {"meta": meta, "state_dict": {"a": torch.ones(2)}, "optimizer": {"lr": 0.1}, "message_hub": hub}, path
    )
    return path


def test_the_message_hub_comes_back_with_its_histories(written):
    hub = load_whole_checkpoint(str(written), map_location="cpu")["message_hub"]
    history = hub["log_scalars"]["train/loss"]
    assert history.data[0].tolist() == [1.0, 2.0, 4.0]
    assert history.data[1].tolist() == [1, 1, 2]
    assert (history.max_length, history.current()) == (50, 4.0)
    assert (hub["runtime_info"], hub["resumed_keys"]) == ({"epoch": 2}, {"train/loss": True})


def test_the_text_of_a_config_that_a_resumed_training_would_run_is_left_out(written):
    assert load_whole_checkpoint(str(written))["meta"] == {"epoch": 2, "iter": 8}


def test_a_checkpoint_that_names_code_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "meta": {"x": Hostile()}}, "bad.pth")
    with pytest.raises(pickle.UnpicklingError):
        load_whole_checkpoint("bad.pth")
    assert not (tmp_path / "made-by-a-checkpoint").exists()


def test_torchs_own_variable_lets_a_checkpoint_be_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "meta": {"x": Hostile()}}, "own.pth")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.warns(UserWarning):
        load_whole_checkpoint("own.pth")
    assert (tmp_path / "made-by-a-checkpoint").exists()


def test_a_trusted_checkpoint_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"meta": {"x": Hostile()}}, "own.pth")
    trust_checkpoints(True)
    try:
        load_whole_checkpoint("own.pth")
    finally:
        trust_checkpoints(False)
    assert (tmp_path / "made-by-a-checkpoint").is_dir()
