"""The measured parts of the pages of results, which commands write between two markers."""

from __future__ import annotations

from pathlib import Path

__all__ = ["markers", "split_page", "write_measured"]


def markers(name: str = "") -> tuple[str, str]:
    """Return the lines around a measured part.

    Args:
        name: of the part, if the page has several.
    """
    which = f"measured {name}" if name else "measured"
    return f"<!-- {which}: begin -->", f"<!-- {which}: end -->"


def split_page(page: Path, name: str = "") -> tuple[str, str]:
    """Return what a page has before and after a measured part.

    Raises:
        ValueError: the page has no such part.
    """
    begin, end = markers(name)
    before, found, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{page} lacks the markers {begin} and {end}")
    return before, after


def write_measured(page: Path, measured: str, name: str = "") -> None:
    """Replace a measured part of a page.

    Raises:
        ValueError: the page has no such part; it stays as it is.
    """
    before, after = split_page(page, name)
    begin, end = markers(name)
    page.write_text(f"{before}{begin}\n\n{measured}\n\n{end}{after}")
