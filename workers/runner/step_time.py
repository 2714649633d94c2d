"""Predicts the time of a step by an online fit of milliseconds to tokens and sequences.

Owns running sums only; time comes as an argument.
"""

from __future__ import annotations

import numpy as np

#: Weight of earlier steps: the fit adapts to a change of load within some hundred steps.
_DECAY = 0.99
_RIDGE = 1e-3


class StepTimeModel:
    """Weighted least squares of ms = a + b * tokens + c * sequences. Before any step it predicts 0."""

    def __init__(self) -> None:
        # The products of each pair of (1, tokens, sequences), and of each with ms. Python floats: numpy's would cost the host ten times
        # more.
        self._one = self._tokens = self._sequences = self._tokens_2 = self._tokens_sequences = self._sequences_2 = 0.0
        self._ms = self._tokens_ms = self._sequences_ms = 0.0
        self.last_ms = 0.0

    def observe(self, tokens: int, sequences: int, ms: float) -> None:
        """Add a step of ``tokens`` query tokens of ``sequences`` sequences that took ``ms`` milliseconds."""
        self._one = self._one * _DECAY + 1.0
        self._tokens = self._tokens * _DECAY + tokens
        self._sequences = self._sequences * _DECAY + sequences
        self._tokens_2 = self._tokens_2 * _DECAY + tokens * tokens
        self._tokens_sequences = self._tokens_sequences * _DECAY + tokens * sequences
        self._sequences_2 = self._sequences_2 * _DECAY + sequences * sequences
        self._ms = self._ms * _DECAY + ms
        self._tokens_ms = self._tokens_ms * _DECAY + tokens * ms
        self._sequences_ms = self._sequences_ms * _DECAY + sequences * ms
        self.last_ms = ms

    def predict(self, tokens: int, sequences: int) -> float:
        """Milliseconds of a step of ``tokens`` query tokens of ``sequences`` sequences; never negative."""
        products = np.array(
            [
                [self._one + _RIDGE, self._tokens, self._sequences],
                [self._tokens, self._tokens_2 + _RIDGE, self._tokens_sequences],
                [self._sequences, self._tokens_sequences, self._sequences_2 + _RIDGE],
            ]
        )
        weights = np.linalg.solve(products, (self._ms, self._tokens_ms, self._sequences_ms))
        return max(0.0, float(weights @ (1.0, tokens, sequences)))
