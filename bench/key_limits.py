"""How well routers keep one API key's limit together: ``python -m bench.key_limits [--minutes 5]``, in simulated time.

Prints, for each number of routers, the least and the most that any minute let through of a limit of 600 requests, while twice as much is
asked for; and how much all routers let through of a burst that comes within one heartbeat.
"""

from __future__ import annotations

import argparse

from orchestrator.auth.api_keys import KeyLimits
from orchestrator.router.key_limits import MINUTE_S
from tests.support.key_traffic import KeyTraffic

LIMIT, HEARTBEAT_S = 600, 0.5


def steady(routers: int, minutes: int) -> tuple[int, int]:
    """Fewest and most requests of any minute."""
    traffic = KeyTraffic(routers, leaders=2, limits=KeyLimits(rpm=LIMIT), heartbeat_s=HEARTBEAT_S, seed=routers)
    admitted = traffic.run(seconds=60.0 * minutes, rate=2 * LIMIT / MINUTE_S, tokens=1, lasts_s=2.0)
    counts = [sum(start <= at < start + MINUTE_S for at in admitted) for start in range(60 * (minutes - 1) + 1)]
    return min(counts), max(counts)


def burst(routers: int) -> int:
    """Requests of a burst that are let through: all of them come within a tenth of a second."""
    traffic = KeyTraffic(routers, leaders=2, limits=KeyLimits(rpm=LIMIT), heartbeat_s=HEARTBEAT_S, seed=routers)
    traffic.run(seconds=2.0, rate=1.0, tokens=1, lasts_s=0.1)
    return len(traffic.run(seconds=0.1, rate=10.0 * routers * LIMIT * 2, tokens=1, lasts_s=0.1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=int, default=5)
    minutes = parser.parse_args().minutes
    for routers in (1, 2, 4, 8):
        least, most = steady(routers, minutes)
        print(f"{routers} routers: {least} to {most} of {LIMIT} a minute; a burst within one heartbeat: {burst(routers)}")


if __name__ == "__main__":
    main()
