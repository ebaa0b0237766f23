"""How long a batch will take, judged by those before it.

A straight line through (cost, seconds), fitted by least squares in which old batches count less and less, and
how far its forecasts were off lately: who acts on a forecast must know whether it can be relied on. A batch far from
the line (its machine had other things to do) counts as one at the edge of what is usual, after Huber's "Robust
Estimation of a Location Parameter" (1964), so that one of them does not stop the forecasts of the next twenty.
Knows nothing about queues or clocks.
"""

from __future__ import annotations

__all__ = ["Forecast"]

MEMORY = 0.93  # weight of a batch falls to a half within ten
LEAST = 6  # batches, before anything is said
# What is usual: so many times the mean error, and a share of the forecast where that has been next to nothing.
USUAL_ERRORS = 3.0
USUAL_SHARE = 0.05
CHANGED = 4  # so many unusual ones after each other are the new usual


class Forecast:
    """Seconds of a batch by its cost."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._told = self._unusual = 0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._error_s = 0.0

    def tell(self, cost: float, seconds: float) -> None:
        """A batch of `cost` took `seconds`."""
        if self._told:
            line = self._line(cost)
            off = seconds - line
            if self._told >= LEAST:
                usual = max(USUAL_ERRORS * self._error_s, USUAL_SHARE * line)
                self._unusual = self._unusual + 1 if abs(off) > usual else 0
                if self._unusual < CHANGED:
                    off = min(max(off, -usual), usual)
                    seconds = line + off
            self._error_s = MEMORY * self._error_s + (1 - MEMORY) * abs(off) if self._told > 1 else abs(off)
        self._weight = MEMORY * self._weight + 1
        self._x = MEMORY * self._x + cost
        self._y = MEMORY * self._y + seconds
        self._xx = MEMORY * self._xx + cost * cost
        self._xy = MEMORY * self._xy + cost * seconds
        self._told += 1

    def seconds(self, cost: float, within_s: float) -> float | None:
        """What a batch of `cost` will take; None while forecasts are off by more than `within_s` on average."""
        if self._told < LEAST or self._error_s > within_s:
            return None
        return self._line(cost)

    def _line(self, cost: float) -> float:
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        # Batches of one cost say nothing about another; nor can more work take less time.
        if spread <= 1e-6 * mean_x * mean_x:
            return mean_y
        slope = max(0.0, (self._xy / self._weight - mean_x * mean_y) / spread)
        return mean_y + slope * (cost - mean_x)
