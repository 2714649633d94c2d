"""What a step will take: an online fit of milliseconds to tokens and rows.

Owns running sums only; time comes as an argument.
"""

from __future__ import annotations

import numpy as np

#: Weight of the past at each step: the fit follows a change of load within some hundred steps.
_DECAY = 0.99
_RIDGE = 1e-3


class StepTimeModel:
    """Weighted least squares of ms = a + b * tokens + c * rows. Before any step it predicts 0."""

    def __init__(self) -> None:
        # Of (1, tokens, rows): the products of each two, and of each with ms. Plain numbers: numpy's would cost the host ten times as much.
        self._one = self._tokens = self._rows = self._tokens_2 = self._tokens_rows = self._rows_2 = 0.0
        self._ms = self._tokens_ms = self._rows_ms = 0.0
        self.last_ms = 0.0

    def observe(self, tokens: int, rows: int, ms: float) -> None:
        self._one = self._one * _DECAY + 1.0
        self._tokens = self._tokens * _DECAY + tokens
        self._rows = self._rows * _DECAY + rows
        self._tokens_2 = self._tokens_2 * _DECAY + tokens * tokens
        self._tokens_rows = self._tokens_rows * _DECAY + tokens * rows
        self._rows_2 = self._rows_2 * _DECAY + rows * rows
        self._ms = self._ms * _DECAY + ms
        self._tokens_ms = self._tokens_ms * _DECAY + tokens * ms
        self._rows_ms = self._rows_ms * _DECAY + rows * ms
        self.last_ms = ms

    def predict(self, tokens: int, rows: int) -> float:
        """Milliseconds, never negative."""
        products = np.array(
            [
                [self._one + _RIDGE, self._tokens, self._rows],
                [self._tokens, self._tokens_2 + _RIDGE, self._tokens_rows],
                [self._rows, self._tokens_rows, self._rows_2 + _RIDGE],
            ]
        )
        weights = np.linalg.solve(products, (self._ms, self._tokens_ms, self._rows_ms))
        return max(0.0, float(weights @ (1.0, tokens, rows)))
