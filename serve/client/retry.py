"""When a request is sent again: what failed, after which pause, how often."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass

from serve.errors import NotReady, Overloaded, ServeError

__all__ = ["Retry"]


@dataclass(frozen=True)
class Retry:
    """Rule of repetition.

    A pause is at least what ``Retry-After`` asks for, and at least half of its own length, a random part of the rest
    added, so that many clients do not come back together. A request is not sent again past its deadline.

    Attributes:
        pauses_s: longest pause before each repetition, seconds; their number is that of the repetitions.
        kinds: errors after which a request is sent again; by default those of the statuses 429 and 503.
        connection_failures: whether an error counts that no server has answered: connection refused or lost.
    """

    pauses_s: tuple[float, ...] = (0.2, 0.5, 1.0, 2.0)
    kinds: tuple[type[ServeError], ...] = (Overloaded, NotReady)
    connection_failures: bool = False

    def pause_s(self, error: ServeError, attempt: int, headers: Mapping[str, str] | None) -> float | None:
        """Return the seconds to wait before the next attempt; None if there is none.

        Args:
            error: why this attempt failed.
            attempt: number of attempts so far.
            headers: of the server's answer, with lower-case names; None if there was no answer.
        """
        if attempt > len(self.pauses_s) or not isinstance(error, self.kinds):
            return None
        if headers is None and not self.connection_failures:
            return None
        spread = 0.5 + random.random() / 2
        asked_s = _retry_after_s((headers or {}).get("retry-after", ""))
        return max(self.pauses_s[attempt - 1] * spread, asked_s * (0.5 + spread))


def _retry_after_s(text: str) -> float:
    """Read ``Retry-After`` (RFC 9110, 10.2.3): seconds or a date; 0 without one."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
