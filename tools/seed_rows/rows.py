"""The 93 lines of upstream's documentation that the project goes by, with the command of today for each.

`check` is a shell command, run in a folder that `tools.seed_rows.work_folder` prepares; in it ``mmdet3d-serve`` is this
checkout's, ``python`` the environment's. `expect` is a pattern that its output must have; rows with the same check
share one run. A row without a check says why in `reason`.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROWS", "Row"]

TABLE = Path(__file__).with_name("rows.toml")


@dataclass(frozen=True)
class Row:
    """One line of upstream's documentation.

    Attributes:
        number: 1 to 93.
        line: what upstream's page says, shortened.
        ours: this project's command or setting, as a user writes it; ``same`` for the line itself.
        check: shell command that shows it; empty if it is not run here.
        expect: regular expression that the output must match.
        needs: ``bucket`` for the S3 server with the rows' data, ``train`` for an environment of `make setup-train`.
        reason: why it is not run here.
    """

    number: int
    line: str
    ours: str
    check: str = ""
    expect: str = ""
    needs: str = ""
    reason: str = ""


def read_rows() -> tuple[Row, ...]:
    """Read the rows of ``rows.toml``."""
    return tuple(Row(**row) for row in tomllib.loads(TABLE.read_text(encoding="utf-8"))["row"])


ROWS = read_rows()
