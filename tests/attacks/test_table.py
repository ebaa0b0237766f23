"""docs/security.md names tests that exist, and every file of attacks is in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "security.md"
HERE = Path(__file__).parent


def rows() -> list[list[str]]:
    """The rows of every table with a column `test`: attack, what happens, tests."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", PAGE.read_text(), re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in table.splitlines()]
        if lines[0][-1].strip() == "test":
            found += lines[2:]
    return found


def names_of_tests(path: Path) -> set[str]:
    """Names of the tests in a file, without importing it."""
    tree = ast.parse(path.read_text())
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def named() -> list[tuple[str, str]]:
    """File and test of every reference in the table; a file alone stands for all tests in it."""
    found = []
    for row in rows():
        references = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row[-1])
        assert references, f"no test in the row: {' | '.join(row)}"
        found += references
    return found


def test_every_row_names_tests_that_exist():
    references = named()
    assert len(references) >= 20
    for path, name in references:
        assert (ROOT / path).is_file(), path
        found = names_of_tests(ROOT / path)
        assert name in found if name else found, f"{path}::{name}"


def test_every_file_of_attacks_is_in_the_table():
    listed = {path for path, _ in named()}
    there = {str(path.relative_to(ROOT)) for path in HERE.glob("*/test_*.py")}
    assert there <= listed, there - listed
