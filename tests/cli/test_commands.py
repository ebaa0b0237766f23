"""Every subcommand: help with examples, and a sentence with exit code 2 for whatever is wrong on its command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from serve import __version__
from serve.cli.entry import bounded, run
from serve.cli.main import COMMANDS, main
from serve.settings import PREFIX


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)
    return tmp_path


def exit_code(*argv: str) -> int:
    try:
        return main(argv)
    except SystemExit as ended:  # argparse
        return int(ended.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--help") == 0
    _, _, examples = capsys.readouterr().out.partition("\nexamples:\n")
    assert f"  mmdet3d-serve {command}" in examples


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_option_is_an_error_of_usage(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--no-such-option") == 2
    assert "error: " in capsys.readouterr().err


def test_help_lists_every_command_and_an_unknown_one_gets_that_list(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code("--help") == 0
    listed = capsys.readouterr().out
    assert all(f"  {command}" in listed for command in COMMANDS)
    assert exit_code("nope") == 2
    out, err = capsys.readouterr()
    assert not out and err == f"error: unknown command 'nope'\n{listed}"


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version_is_that_of_the_package(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(flag) == 0
    assert capsys.readouterr().out == f"mmdet3d-serve {__version__}\n"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("draw frame.bin answer.json -o out.png --load-dim 0", "--load-dim"),
        ("archive second --model-name a/b", "a/b"),
        ("archive second --model-version one", "one"),
        ("archive", "MODEL"),
        ("verify frame.bin second second.pth second --score-thr 3", "--score-thr"),
        ("verify frame.bin second second.pth second --score-tolerance -1", "--score-tolerance"),
        ("draw frame.bin answer.json -o out.png --load-dim four", "--load-dim"),
        ("draw frame.bin answer.json -o out.png --width -3", "--width"),
        ("draw frame.bin answer.json -o out.png --height 0", "--height"),
        ("draw frame.bin answer.json -o out.png --width 10000000", "--width"),
        ("draw frame.bin answer.json -o out.png --score-thr 3", "--score-thr"),
        ("draw frame.bin answer.json -o out.png --score-thr nan", "--score-thr"),
        ("draw missing.bin answer.json -o out.png", "missing.bin"),
        ("draw frame.bin answer.json -o nowhere/out.png", "nowhere/out.png"),
        ("draw frame.bin frame.bin -o out.png", "frame.bin"),
        ("serve", "model-store"),
        ("serve --models second --workers 0", "--workers must be"),
        ("serve --models a=b=c", "--models must be"),
        ("serve --models second --management-host 0.0.0.0", "--management-host=0.0.0.0"),
        ("serve --models second --metrics-port 8080", "--metrics-port=8080"),
        ("serve --models second --gateway-cors-origins * --gateway-api-keys-file k", "--gateway-cors-origins=*"),
        ("serve --models second --gateway-worker-sockets /run/w", "--gateway-worker-sockets"),
        ("gateway --port 65536", "--port must be"),
        ("gateway --batch-bytes 99999999", "--batch-bytes=99999999"),
        ("gateway --inference-url localhost:8080", "--inference-url must start"),
        ("pack missing out.ffr", "missing"),
        ("pack . frame.bin", "frame.bin exists"),
        ("pack bare out.ffr", "bare has no files"),
        ("predict missing.bin --model none.mar", "missing.bin"),  # before the model is looked for
        ("evaluate none.py --model m --out nowhere/r.pkl", "nowhere"),
        ("push missing.mar --to s3://bucket/models", "missing.mar"),
        ("fetch --from ftp://bucket/models --to store", "'ftp'"),
        ("zoo no such model", "no such model"),
    ],
)  # fmt: skip
def test_wrong_value_is_reported_by_name_with_exit_code_2(
    line: str, named: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty_folder / "frame.bin").write_bytes(bytes(16))
    (empty_folder / "bare").mkdir()
    (empty_folder / "answer.json").write_text(
        '{"bboxes_3d": [], "scores_3d": [], "labels_3d": [], "names": []}'
    )
    assert exit_code(*line.split()) == 2
    written = capsys.readouterr().err
    assert named in written.splitlines()[-1] and "error: " in written


def test_draw_draws_with_the_least_values_it_accepts(empty_folder: Path) -> None:
    (empty_folder / "frame.bin").write_bytes(bytes(12))
    (empty_folder / "answer.json").write_text(
        '{"bboxes_3d": [], "scores_3d": [], "labels_3d": [], "names": []}'
    )
    limits = ["--load-dim", "3", "--width", "64", "--height", "64", "--score-thr", "0"]
    assert exit_code("draw", "frame.bin", "answer.json", "-o", "out.png", *limits) == 0
    assert (empty_folder / "out.png").read_bytes().startswith(b"\x89PNG")


def test_stop_without_servers_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["stop"], ["serve", "--stop"], ["serve", "--stop", "--state-dir", "elsewhere"]):
        assert exit_code(*line) == 0
        assert capsys.readouterr().out == "no running server found\n"


@pytest.mark.parametrize("text", ["0", "5", "one", "", "nan", "inf", "-inf"])
@pytest.mark.parametrize("kind", [int, float])
def test_bounded_number_outside_its_range_is_rejected(kind: type[int] | type[float], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        bounded(kind, 1, 4)(text)


def test_bounded_number_is_whole_if_asked_for_and_always_finite() -> None:
    for parse, text in ((bounded(int, 1, 4), "1.5"), (bounded(float, 1), "inf")):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_bounded_number_includes_its_bounds_and_keeps_its_type() -> None:
    values = [bounded(int, 1, 4)("1"), bounded(int, 1)("4000"), bounded(float, 0, 1)("1")]
    assert values == [1, 4000, 1.0] and [type(value) for value in values] == [int, int, float]


def test_message_of_a_bounded_number_has_range_unit_and_value() -> None:
    with pytest.raises(
        argparse.ArgumentTypeError,
        match=r"^must be a whole number of at least 1 and at most 4 \(pixels\), got '9'$",
    ):
        bounded(int, 1, 4, "pixels")("9")


def test_exception_that_no_command_expects_ends_with_the_status_of_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(argv: Sequence[str] | None) -> int:
        raise LookupError("a fault of the program")

    assert run(fail) == 2  # 1 means that the work is done, and some of it failed or differs
    assert "LookupError: a fault of the program" in capsys.readouterr().err
