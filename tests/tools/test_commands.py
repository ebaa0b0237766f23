"""``python -m tools.NAME``: usage, and exit codes for what is wrong on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from serve.cli import run
from tools.bench import __main__ as bench
from tools.bench.commands import detector, ops
from tools.commands import dispatch, replace_renamed


def test_unknown_name_is_an_error_before_the_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "nope"])
    assert dispatch("python -m tools.bench", bench.COMMANDS) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: unknown name 'nope'\nusage: python -m tools.bench NAME")


def test_usage_alone_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert dispatch("python -m tools.bench", bench.COMMANDS) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: ") and all(name in out for name in bench.COMMANDS) and not err


def test_former_name_of_a_flag_is_replaced_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    renamed = {"--old": "--new"}
    assert replace_renamed(["--old=1", "--old", "x"], renamed) == ["--new=1", "--new", "x"]
    assert "--old is now --new" in capsys.readouterr().err


@pytest.mark.parametrize("command", [ops.main, detector.main])
@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_device_that_is_not_there_is_an_error_of_usage(
    command, device: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(command, ["--device", device]) == 2
    assert device in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "argv"),
    [(ops.main, ["--threads", "-1"]), (ops.main, ["--processes", "0"]), (detector.main, ["--rounds", "0"])],
)
def test_number_out_of_range_is_an_error_of_usage(
    command, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(argv)
    assert ended.value.code == 2 and f"argument {argv[0]}: must be" in capsys.readouterr().err
