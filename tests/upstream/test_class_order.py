"""The order of the classes in a checkpoint and in the data set, before upstream's runner starts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from serve.errors import DataSetError
from serve.upstream.checkpoint_checks import check_test_checkpoint, check_training_checkpoint

STREETS = ("car", "person")


@pytest.fixture
def runner_of(tmp_path):
    def make(*classes: str, resume: bool = False):
        model = torch.nn.Linear(2, 2)
        file = tmp_path / "w.pth"
        torch.save({"state_dict": model.state_dict(), "meta": {"dataset_meta": {"classes": STREETS}}}, file)
        loader = {"dataset": {"type": "RepeatDataset", "dataset": {"metainfo": {"classes": classes}}}}
        return SimpleNamespace(
            model=model,
            _load_from=str(file),
            _resume=resume,
            _test_dataloader=loader,
            _train_dataloader=loader,
        )

    return make


def test_a_test_on_the_classes_in_another_order_is_an_error_with_both_lists(runner_of, tmp_path):
    with pytest.raises(DataSetError, match=r"car, person.*person, car"):
        check_test_checkpoint(runner_of("person", "car"), tmp_path, allow_partial=False, trust=False)


@pytest.mark.parametrize("classes", [STREETS, ("car", "human")])
def test_the_same_order_and_another_spelling_are_tested(classes, runner_of, tmp_path):
    check_test_checkpoint(runner_of(*classes), tmp_path, allow_partial=False, trust=False)


def test_a_training_that_is_resumed_in_another_order_is_an_error(runner_of):
    with pytest.raises(DataSetError, match="mixed up"):
        check_training_checkpoint(runner_of("person", "car", resume=True), allow_partial=False, trust=False)


def test_a_training_that_starts_from_weights_in_another_order_is_warned_of(runner_of, capsys):
    check_training_checkpoint(runner_of("person", "car"), allow_partial=False, trust=False)
    assert capsys.readouterr().err.startswith("warning: ")
    check_training_checkpoint(runner_of(*STREETS), allow_partial=False, trust=False)
    assert not capsys.readouterr().err
