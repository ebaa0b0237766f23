"""What the log of TorchServe says of a model that does not load."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.torchserve.log import WorkerLog


def logged(path: Path, *messages: tuple[str, str, str]) -> None:
    with path.open("a") as log:
        for thread, logger, message in messages:
            log.write(f"2026-01-01T00:00:00,000 INFO [{thread}] {logger}: {message}\n")


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "torchserve.log"


STDOUT = "W-9000-second_1.0-stdout"
DEATH = (
    ("W-9000-second_1.0", "WorkerThread", "Retry worker: 9000 in 1 seconds."),
    (STDOUT, "WorkerLifeCycle", f"Stopped Scanner - {STDOUT}"),
)


def test_load_failure_reason_is_the_last_exception_of_the_worker(log_path: Path) -> None:
    log = WorkerLog(log_path)
    assert log.failure({"second"}) is None
    logged(
        log_path,
        (STDOUT, "MODEL_LOG", "Traceback (most recent call last):"),
        (STDOUT, "MODEL_LOG", '  File "x.py", line 1'),
        (STDOUT, "MODEL_LOG", "KeyError: 'a'"),
        (STDOUT, "MODEL_LOG", "During handling of the above exception, another exception occurred:"),
        (STDOUT, "MODEL_LOG", "Traceback (most recent call last):"),
        (STDOUT, "MODEL_LOG", "ValueError: no such layer: neck.0"),
        (STDOUT, "MODEL_LOG", "Backend worker process died."),
        (STDOUT, "MODEL_LOG", "Traceback (most recent call last):"),
        (STDOUT, "MODEL_LOG", "RuntimeError: 500 - Unknown exception"),
        ("W-9000-second_1.0", "WorkerThread", "Retry worker: 9000 in 1 seconds."),
        (STDOUT, "WorkerLifeCycle", f"Stopped Scanner - {STDOUT}"),
    )
    failure = log.failure({"second"})
    assert failure is not None
    assert (failure.model, failure.reason) == ("second", "ValueError: no such layer: neck.0")


def test_worker_that_dies_silently_twice_is_reported(log_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("serve.torchserve.log.time.monotonic", lambda: now)
    log = WorkerLog(log_path)
    for second_at in (101.0, 200.0):
        logged(log_path, *DEATH)
        assert log.failure({"second"}) is None
        now = second_at
    failure = log.failure({"second"})
    assert failure is not None
    assert "out of memory" in failure.reason


def test_reason_lost_with_the_first_death_is_read_from_the_second(log_path: Path) -> None:
    """TorchServe stops reading when it notices that a worker is gone, whatever the pipe still holds."""
    log = WorkerLog(log_path)
    logged(log_path, (STDOUT, "MODEL_LOG", "model_name: second, batchSize: 1"), *DEATH)
    assert log.failure({"second"}) is None
    logged(
        log_path,
        (STDOUT, "MODEL_LOG", "Traceback (most recent call last):"),
        (STDOUT, "MODEL_LOG", "serve.errors.ArchiveError: weights.safetensors has the wrong hash"),
        *DEATH,
    )
    failure = log.failure({"second"})
    assert failure is not None
    assert failure.reason == "weights.safetensors has the wrong hash"


def test_death_of_another_model_is_not_the_reason(log_path: Path) -> None:
    log = WorkerLog(log_path)
    logged(
        log_path,
        ("W-9000-second_1.0", "WorkerThread", "Retry worker: 9000 in 1 seconds."),
        (STDOUT, "WorkerLifeCycle", f"Stopped Scanner - {STDOUT}"),
    )
    assert log.failure({"other"}) is None
    log.discard()
    assert log.failure({"second"}) is None
