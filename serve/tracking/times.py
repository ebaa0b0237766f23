"""Times of frames that are files: Unix times in their names, as recorders write them."""

from __future__ import annotations

import re

__all__ = ["time_in_name"]

# 10 digits of seconds, 13 of milliseconds, 16 of microseconds, 19 of nanoseconds.
_UNIX_TIME = re.compile(r"(?<!\d)(\d{10}(?:\.\d+)?|\d{13}|\d{16}|\d{19})(?!\d)")
_FIRST_S, _LAST_S = 946_684_800, 4_102_444_800  # from 2000 to 2100


def time_in_name(name: str) -> float | None:
    """Return the last Unix time in the name of a file, in seconds; None without one."""
    found = _UNIX_TIME.findall(name)
    if not found:
        return None
    whole = found[-1].partition(".")[0]
    time_s = float(found[-1]) / 10.0 ** (len(whole) - 10)
    return time_s if _FIRST_S <= time_s < _LAST_S else None
