"""Tenants beside each other, in the simulator: real cores, real schedulers and the fake engine, in simulated time."""

from __future__ import annotations

from random import Random

import msgspec
import pytest

from orchestrator.router.core.fair_order import AGING_S, OUTPUT_PRICE, PROMPT_PRICE
from orchestrator.sim.schedule import Arrive, Schedule, SimSetup
from orchestrator.sim.sim_client import SimClient
from orchestrator.sim.world import World

#: Sequences of a replica, and the longest prompt and answer, tokens.
SEQUENCES, PROMPT, OUTPUT = 8, 24, 16
LIGHT = 10


class WatchedWorld(World):
    """One router and one replica. ``gaps``: by how much the tenants' service differed at each look at which all of them waited."""

    def __init__(self, arrivals: list[Arrive]) -> None:
        setup = SimSetup(
            routers=1, replicas=1, sequences=SEQUENCES, blocks=64, tokens=64, stages=1, step_ms=20.0, repeats=0.0, noise=3, max_queue=4096
        )
        super().__init__(Schedule(setup=setup, events=sorted(arrivals, key=lambda arrival: arrival.at)))
        self._tenants = {arrival.tenant for arrival in arrivals}
        self.gaps: list[float] = []

    def _look(self, until: float) -> None:
        super()._look(until)
        if {client.asked.tenant for client in self.clients.values() if client.first_at is None} == self._tenants:
            got = dict.fromkeys(self._tenants, 0.0)
            for client in self.clients.values():
                if client.first_at is not None:
                    got[client.asked.tenant] += len(client.asked.prompt) * PROMPT_PRICE + client.tokens * OUTPUT_PRICE
            self.gaps.append(max(got.values()) - min(got.values()))


def arrival(chance: Random, id: int, tenant: str, at: float) -> Arrive:
    """A request that never ends before its limit, so that its service is known."""
    prompt = [chance.randrange(32, 127) for _ in range(chance.randint(8, PROMPT))]
    return Arrive(at=at, id=id, frontend="http", router=0, prompt=prompt, max_tokens=chance.randint(8, OUTPUT), tenant=tenant)


def light(chance: Random) -> list[Arrive]:
    """Ten tenants with a request now and then, together about half of what a replica can do."""
    return [arrival(chance, id, f"light{id % LIGHT}", round(chance.uniform(1.0, 11.0), 3)) for id in range(60)]


def p99(clients: list[SimClient], tenant: str) -> float:
    spent = sorted(client.ended_at - client.asked.at for client in clients if client.asked.tenant.startswith(tenant))
    assert spent and all(client.outcome == "finished" for client in clients)
    return spent[int(len(spent) * 0.99)]


def test_light_tenants_beside_a_heavy_one_wait_at_most_twice_as_long() -> None:
    """The heavy tenant asks for everything at once; first come first served would have the light ones wait for all of it."""
    chance = Random(7)
    few = light(chance)
    many = [arrival(chance, 1000 + number, "heavy", 0.5) for number in range(400)]
    alone, together = WatchedWorld(few), WatchedWorld(few + many)
    alone.run()
    together.run()
    quiet, crowded = p99(list(alone.clients.values()), "light"), p99(list(together.clients.values()), "light")
    assert p99(list(together.clients.values()), "heavy") > 10.0, "the heavy tenant has work all the time"
    assert crowded <= 2 * quiet, f"{crowded:.2f} s beside {quiet:.2f} s alone"


@pytest.mark.parametrize("tenants", [2, 5])
def test_tenants_with_work_differ_by_a_bound_that_does_not_grow(tenants: int) -> None:
    """Counted in what clients were given, at every half second while all of them have work."""
    chance = Random(tenants)
    arrivals = [arrival(chance, number, f"t{number % tenants}", 0.1) for number in range(300)]
    here = WatchedWorld(arrivals)
    here.run()
    bound = SEQUENCES * 17 / 16 * (PROMPT * PROMPT_PRICE + OUTPUT * OUTPUT_PRICE) + PROMPT * PROMPT_PRICE
    assert len(here.gaps) > 10
    assert max(here.gaps) <= bound, f"{max(here.gaps)} is more than {bound}"


def test_a_less_urgent_tenant_is_not_starved() -> None:
    """Urgent requests keep the replica full for a quarter of a minute. One of the band below goes first every five seconds."""
    chance = Random(11)
    urgent = [
        msgspec.structs.replace(arrival(chance, number, f"u{number % 3}", round(number * 0.02, 3)), priority=-1) for number in range(500)
    ]
    low = [msgspec.structs.replace(arrival(chance, 2000 + number, "low", 1.0), priority=4) for number in range(2)]
    here = WatchedWorld(urgent + low)
    here.run()
    firsts = sorted(here.clients[2000 + number].first_at or 0.0 for number in range(2))
    busy_until = max(client.first_at or 0.0 for id, client in here.clients.items() if id < 500)
    assert firsts[-1] < busy_until, "all of them were served while urgent ones waited"
    for turn, first in enumerate(firsts, 1):
        # A place comes free within the time that a request takes.
        assert turn * AGING_S - 0.5 <= first - 1.0 <= turn * (AGING_S + 1.5), (turn, first)
