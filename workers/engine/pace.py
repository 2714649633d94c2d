"""What a step will take: an online fit of milliseconds to tokens and rows.

Owns running sums only; time comes as an argument.
"""

from __future__ import annotations

import numpy as np

#: Weight of the past at each step: the fit follows a change of load within some hundred steps.
_DECAY = 0.99
_RIDGE = 1e-3


class Pace:
    """Weighted least squares of ms = a + b * tokens + c * rows. Before any step it predicts 0."""

    def __init__(self) -> None:
        self._products = np.zeros((3, 3))
        self._targets = np.zeros(3)
        self.last_ms = 0.0

    def observe(self, tokens: int, rows: int, ms: float) -> None:
        features = np.array([1.0, tokens, rows])
        self._products = self._products * _DECAY + np.outer(features, features)
        self._targets = self._targets * _DECAY + features * ms
        self.last_ms = ms

    def predict(self, tokens: int, rows: int) -> float:
        """Milliseconds, never negative."""
        weights = np.linalg.solve(self._products + _RIDGE * np.eye(3), self._targets)
        return max(0.0, float(weights @ (1.0, tokens, rows)))
