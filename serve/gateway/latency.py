"""Latency model: predicts the duration of a batch from its cost.

A least-squares line through (cost, seconds) with exponentially decaying weights, and a running mean of its absolute
error, so that the caller can judge whether to rely on a prediction. An outlier (the machine was busy with something
else) is clipped to the outlier limit, after Huber's "Robust Estimation of a Location Parameter" (1964), so that one
of them does not suspend the predictions of the next twenty batches.
"""

from __future__ import annotations

__all__ = ["LatencyModel"]

DECAY = 0.93  # the weight of a batch halves within ten batches
MIN_BATCHES = 6  # observed before the first prediction
# The outlier limit: this many mean errors, and at least this share of the prediction.
OUTLIER_ERRORS = 3.0
MIN_OUTLIER_SHARE = 0.05
RESET_AFTER = 4  # consecutive outliers are taken as the new normal


class LatencyModel:
    """Predicts seconds from cost, online."""

    def __init__(self) -> None:
        """Start without observations."""
        self._batches = self._outliers = 0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._error_s = 0.0

    def observe(self, cost: float, seconds: float) -> None:
        """Add one batch of `cost` that took `seconds`."""
        if self._batches:
            line = self._line(cost)
            error_s = seconds - line
            if self._batches >= MIN_BATCHES:
                limit_s = max(OUTLIER_ERRORS * self._error_s, MIN_OUTLIER_SHARE * line)
                self._outliers = self._outliers + 1 if abs(error_s) > limit_s else 0
                if self._outliers < RESET_AFTER:
                    error_s = min(max(error_s, -limit_s), limit_s)
                    seconds = line + error_s
            self._error_s = (
                DECAY * self._error_s + (1 - DECAY) * abs(error_s) if self._batches > 1 else abs(error_s)
            )
        self._weight = DECAY * self._weight + 1
        self._x = DECAY * self._x + cost
        self._y = DECAY * self._y + seconds
        self._xx = DECAY * self._xx + cost * cost
        self._xy = DECAY * self._xy + cost * seconds
        self._batches += 1

    def predict(self, cost: float, max_error_s: float) -> float | None:
        """Seconds that a batch of `cost` will take; None while the mean error is over `max_error_s`."""
        if self._batches < MIN_BATCHES or self._error_s > max_error_s:
            return None
        return self._line(cost)

    def _line(self, cost: float) -> float:
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        # Batches of a single cost determine no slope, and more work cannot take less time.
        if spread <= 1e-6 * mean_x * mean_x:
            return mean_y
        slope = max(0.0, (self._xy / self._weight - mean_x * mean_y) / spread)
        return mean_y + slope * (cost - mean_x)
