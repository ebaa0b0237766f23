"""The board of a run on Ray, without Ray: what it knows outlives its process."""

from __future__ import annotations

from pathlib import Path

from serve.bulk.ray_worker import Board


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
