"""How many examples a property test draws: a share of its full number in a usual run, more than all of them in a long one."""

from __future__ import annotations

import os

#: ``make test-long`` sets 4. Each run draws other examples, so that many usual runs see as much as a long one.
SHARE = float(os.environ.get("EXAMPLES", "0.4"))


def examples(full: int) -> int:
    """Of ``full`` examples, those of this run: at least 10."""
    return max(10, round(SHARE * full))
