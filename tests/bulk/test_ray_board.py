"""The board of a run on Ray, without Ray: what it knows outlives its process."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from serve.bulk.parts import Job, manifest_line
from serve.bulk.ray_worker import Board, PartWorker, Task
from serve.errors import SettingsError
from serve.predict.frames import Clip
from serve.predict.sources import frame_at
from serve.protocol.options import FrameOptions


def test_the_next_process_of_the_board_knows_what_the_last_one_knew(tmp_path: Path) -> None:
    journal = str(tmp_path / "journal")

    def lose_a_process(attempt: str, frame: int | None) -> tuple[bool, frozenset[int], str]:
        """Take part 7 on a new board, and have its process end with a frame, or while it loads its model."""
        board = Board(journal)
        taken = board.take(7, attempt, "cpu of a")
        assert (
            Board(journal).take(7, attempt, "cpu of a") == taken
        )  # asked again: the answer was lost, not the process
        if frame is not None:
            board.begin(7, attempt, 0)
            board.begin(7, attempt, frame)
        return taken

    nothing = frozenset[int]()
    assert lose_a_process("a", 2) == (False, nothing, "")
    assert lose_a_process("b", 3) == (True, nothing, "")
    assert lose_a_process("c", 3) == (True, nothing, "")
    assert lose_a_process("d", 1) == (True, frozenset({2}), "")
    Board(journal).finish(7, 5)
    assert Board(journal).begun() == 5
    for attempt in "efg":
        assert lose_a_process(attempt, None)[2] == ""
    assert "3 processes" in lose_a_process("h", None)[2]


def test_an_attempt_that_was_given_up_does_not_count(tmp_path: Path) -> None:
    board = Board(str(tmp_path / "journal"))
    board.take(1, "lost", "cpu of a")
    board.begin(1, "lost", 0)
    board.take(1, "next", "cpu of b")
    board.begin(1, "lost", 9)  # of a machine that was only silent
    assert board.begun() == 0
    assert board.take(1, "third", "cpu of b") == (True, frozenset(), "")


def test_a_line_that_was_not_written_whole_is_left_out(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    Board(str(journal)).finish(1, 5)
    with journal.open("ab") as file:
        file.write(b'\n["finish",2')
    Board(str(journal)).finish(3, 5)
    assert Board(str(journal)).begun() == 10


@pytest.mark.parametrize("kind", ["ffrecord", "lmdb"])
def test_a_machine_that_does_not_see_a_packed_file_ends_the_run(kind: str, tmp_path: Path) -> None:
    (tmp_path / "bulk.json").write_bytes(b"{}")
    job = Job("model.mar", False, FrameOptions(), 2)
    task = Task(job, "", str(tmp_path), hashlib.sha256(b"{}").hexdigest(), "cpu", 1)
    (line,) = [manifest_line(frame_at("a", "a", f"{kind}://{tmp_path}/packed#a.bin", Clip("one")))]
    with pytest.raises(SettingsError):
        PartWorker(task, None)._check([line])
    (tmp_path / "packed").touch()
    PartWorker(task, None)._check([line])
