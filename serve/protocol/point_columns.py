"""Columns of points: a model's, a client's, and a file's put in the model's order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve.errors import UndecodableFrame, UnknownOption
from serve.protocol.point_table import MAX_COLUMNS, STANDARD_NAME, PointTable

__all__ = ["Columns", "PointLayout", "arrange", "name_columns", "parse_columns"]

_COLUMN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]{0,63})\s*(?:=\s*([-+0-9.eE]{1,32}))?\s*")


@dataclass(frozen=True)
class PointLayout:
    """Columns of the points that a model accepts.

    Attributes:
        columns: standard names, in order.
        used: indices of the columns that the model uses; a file that names its columns may lack the others.
    """

    columns: tuple[str, ...]
    used: frozenset[int]

    @classmethod
    def default(cls, load_dim: int, *, is_depth: bool, used: Sequence[int] | None = None) -> PointLayout:
        """Return the usual columns of a sensor: LiDAR (nuScenes' order) or depth camera."""
        usual = (
            ("x", "y", "z", "red", "green", "blue")
            if is_depth
            else ("x", "y", "z", "intensity", "ring", "time")
        )
        names = (*usual[:load_dim], *(f"column_{k}" for k in range(len(usual), load_dim)))
        return cls(names, frozenset(range(load_dim) if used is None else used))


@dataclass(frozen=True)
class Columns:
    """Columns as declared by a client (``columns=x,y,z,intensity=0``).

    Attributes:
        names: standard name of each column of the file, in order.
        constants: values of columns that the file lacks.
    """

    names: tuple[str, ...]
    constants: Mapping[str, float]


def parse_columns(text: str) -> Columns:
    """Parse the option ``columns``: names in the file's order, and constants for missing columns.

    Raises:
        UnknownOption: the text does not have this form.
    """
    names: list[str] = []
    constants: dict[str, float] = {}
    for part in text.split(",")[: MAX_COLUMNS + 1]:
        found = _COLUMN.fullmatch(part)
        if found is None or len(names) == MAX_COLUMNS:
            raise UnknownOption(
                f"columns: '{part[:80]}' is neither a column name nor name=value, as in x,y,z,intensity=0"
            )
        name = STANDARD_NAME.get(found[1].lower(), found[1])
        if name in names or name in constants:
            raise UnknownOption(f"columns: '{name}' occurs twice")
        if found[2] is None:
            names.append(name)
            continue
        try:
            constants[name] = float(found[2])
        except ValueError:
            raise UnknownOption(f"columns: {name}={found[2]} is not a number") from None
    return Columns(tuple(names), constants)


def name_columns(table: PointTable, declared: Columns | None, layout: PointLayout) -> PointTable:
    """Name the columns of a table that numbers them: as declared, else as the model's."""
    if "0" not in table.columns:
        return table
    names = declared.names if declared else layout.columns
    if len(table.columns) != len(names):
        raise UndecodableFrame(
            f"the {table.format} array is ({table.count}, {len(table.columns)}), this model takes "
            f"(N, {len(names)}); name its columns, as in columns=x,y,z,intensity"
        )
    return PointTable(table.format, dict(zip(names, table.columns.values(), strict=True)), table.count)


def arrange(
    table: PointTable, layout: PointLayout, constants: Mapping[str, float]
) -> npt.NDArray[np.float32]:
    """Arrange columns in the order of the model.

    Args:
        table: columns of the file.
        layout: columns of the model; unused ones may be missing and become 0.
        constants: values given by the client for missing columns.

    Returns:
        (N, len(layout.columns)) float32.

    Raises:
        UndecodableFrame: a column that the model uses is missing.
    """
    missing = [
        name
        for k, name in enumerate(layout.columns)
        if k in layout.used and name not in table.columns and name not in constants
    ]
    if missing:
        raise UndecodableFrame(
            f"the {table.format} file has no column {', '.join(missing)}, which the model uses; it has "
            f"{', '.join(table.columns) or 'none'}; give a value, as in columns={missing[0]}=0, or send the column"
        )
    points = np.zeros((table.count, len(layout.columns)), dtype=np.float32)
    with np.errstate(over="ignore"):  # a double out of range becomes inf, which is rejected later
        for k, name in enumerate(layout.columns):
            if name in table.columns:
                points[:, k] = table.columns[name]
            else:
                points[:, k] = constants.get(name, 0.0)
    return points
