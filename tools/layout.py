"""Print packages, imports between them, lines and the README's size.

    python -m tools.layout                 this checkout
    python -m tools.layout --root DIR      another one, for instance of an earlier commit

A room is a top-level package or module below ``serve/``, ``handlers/`` or ``tools/`` (a package counts once, whatever
it holds). An arrow is one room that imports another, at module level or inside a function. A floor is the length of the
longest chain of arrows below a room.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Below these every entry is a room; the others are one room each.
SPLIT = ("serve",)
WHOLE = ("handlers", "tools")


def rooms(root: Path) -> dict[str, list[Path]]:
    """Return the sources by room."""
    found: dict[str, list[Path]] = {}
    for top in (*SPLIT, *WHOLE):
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:2]) if top in SPLIT else top
            if parts != (top, "__init__"):
                found.setdefault(name.removesuffix(".__init__"), []).append(path)
    return found


def arrows(root: Path, found: dict[str, list[Path]]) -> set[tuple[str, str]]:
    """Return pairs (room that imports, room that is imported)."""

    def room_of(module: str) -> str | None:
        parts = module.split(".")
        name = ".".join(parts[:2]) if parts[0] in SPLIT else parts[0]
        return name if name in found else None

    pairs = set()
    for room, paths in found.items():
        for path in paths:
            for module in _imports(path):
                target = room_of(module)
                if target is not None and target != room:
                    pairs.add((room, target))
    return pairs


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floors(found: dict[str, list[Path]], pairs: set[tuple[str, str]]) -> int:
    """Return the length of the longest chain of imports, in rooms; a circle counts once."""

    @cache
    def height(room: str, above: frozenset[str]) -> int:
        below = {target for source, target in pairs if source == room} - above
        return 1 + max((height(target, above | {room}) for target in below), default=0)

    return max(height(room, frozenset()) for room in found)


def main() -> int:
    """Print one line per figure."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.layout",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to measure (default: this one)")
    root = parser.parse_args().root.resolve()
    found = rooms(root)
    pairs = arrows(root, found)

    def lines(top: str) -> int:
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (root / top).rglob("*.py"))

    print(
        f"entries of serve/   {sum(1 for path in (root / 'serve').iterdir() if path.name != '__pycache__')}"
    )
    print(f"rooms               {len(found):<6} packages and top-level modules")
    print(f"arrows              {len(pairs):<6} pairs of rooms of which one imports the other")
    print(f"floors              {floors(found, pairs):<6} rooms in the longest chain of imports")
    for top in ("serve", "handlers", "tools", "tests"):
        print(f"lines of {top + '/':<11}{lines(top)}")
    print(f"README.md, bytes    {(root / 'README.md').stat().st_size}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
