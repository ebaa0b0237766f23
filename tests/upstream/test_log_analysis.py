"""Training logs of mmengine and of mmcv 1: curves and times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.errors import SettingsError
from serve.upstream.log_analysis import main, read_log, series_of


def write(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def train(epoch: int, step: int, **values: float) -> dict:
    return {
        "lr": 0.1,
        "time": 0.5 * epoch,
        "loss": 3.0 - step / 10,
        "epoch": epoch,
        "iter": step,
        "step": step,
        **values,
    }


@pytest.fixture
def today(tmp_path) -> Path:
    """Two epochs of four iterations, each with a validation, as mmengine writes them."""
    lines = [train(1, step) for step in range(1, 5)]
    lines.append({"coco/bbox_mAP": 0.1, "data_time": 0.1, "time": 9.0, "step": 1})
    lines += [train(2, step) for step in range(5, 9)]
    lines.append({"coco/bbox_mAP": 0.2, "data_time": 0.1, "time": 9.0, "step": 2})
    return write(tmp_path / "today.json", *lines)


@pytest.fixture
def former(tmp_path) -> Path:
    """The same as mmcv 1 wrote it: iterations count from 1 in every epoch, and lines have a mode."""
    lines: list[dict] = [{"env_info": "x", "seed": 0}]
    for epoch in (1, 2):
        for step in range(1, 5):
            line = {"mode": "train", "epoch": epoch, "iter": step, "lr": 0.1, "time": 0.5 * epoch}
            lines.append({**line, "loss": 3.0 - (step + 4 * (epoch - 1)) / 10})
        lines.append({"mode": "val", "epoch": epoch, "iter": 2, "lr": 0.1, "bbox_mAP": epoch / 10})
    return write(tmp_path / "former.log.json", *lines)


@pytest.mark.parametrize("kind", ["today", "former"])
def test_losses_have_the_iterations_at_which_they_were_logged(kind, request):
    steps, values, is_validation = series_of(read_log(request.getfixturevalue(kind)), "loss")
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert values == pytest.approx([3.0 - step / 10 for step in steps])
    assert not is_validation


@pytest.mark.parametrize("kind", ["today", "former"])
def test_metrics_have_the_epochs_after_which_they_were_measured(kind, request):
    epochs, values, is_validation = series_of(read_log(request.getfixturevalue(kind)), "bbox_mAP")
    assert (epochs, is_validation) == ([1, 2], True)
    assert values == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("kind", ["today", "former"])
def test_times_of_validations_and_of_first_lines_are_left_out(kind, request, capsys):
    assert main(["cal_train_time", str(request.getfixturevalue(kind))], "analyze_logs") == 0
    shown = capsys.readouterr().out
    assert "slowest epoch 2, average time is 1.0000" in shown
    assert "fastest epoch 1, average time is 0.5000" in shown
    assert "time std over epochs is 0.2500" in shown
    assert "average iter time: 0.7500 s/iter" in shown


def test_two_logs_and_two_keys_make_a_pdf(today, former, tmp_path):
    target = tmp_path / "curves.pdf"
    given = [
        "plot_curve",
        str(today),
        str(former),
        "--keys",
        "loss",
        "bbox_mAP",
        "--legend",
        *"abcd",
        "--out",
        str(target),
    ]
    assert main(given, "analyze_logs") == 0
    assert target.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--keys", "nothing"],
        ["--keys", "loss", "--legend", "a", "b"],
        ["--keys", "loss", "--mode", "eval"],
    ],
    ids=["unknown_key", "legends", "mode"],
)
def test_what_cannot_be_plotted_is_an_error_without_a_file(today, tmp_path, arguments):
    target = tmp_path / "curve.png"
    with pytest.raises(SettingsError):
        main(["plot_curve", str(today), *arguments, "--out", str(target)], "analyze_logs")
    assert not target.exists()


@pytest.mark.parametrize("text", ["", "no json\n", "[1]\n", '{"env_info": "x"}\n'])
def test_a_file_that_is_no_log_is_an_error(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(SettingsError):
        read_log(path)
