"""The order in which choices wait for a replica. Owns one model's queue; :mod:`orchestrator.router.core.request_table` moves choices in
and out."""

from __future__ import annotations

from collections import OrderedDict

from orchestrator.router.core.choice_state import ChoiceState
from orchestrator.router.core.fair_order import FairOrder, FairOrderSnapshot


class WaitingQueue:
    """One model's queue. Choices that lost their place go first, in the order of their times. New ones take turns by tenant and priority,
    as ``order`` says; those of one tenant and priority in the order of their arrival. ``tokens``: of the prompts of all."""

    __slots__ = ("_fresh", "_returned", "order", "tokens")

    def __init__(self, found: FairOrderSnapshot | None = None) -> None:
        self._returned: OrderedDict[int, ChoiceState] = OrderedDict()
        self._fresh: OrderedDict[int, ChoiceState] = OrderedDict()
        self.order = FairOrder(found)
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._returned) + len(self._fresh)

    def __contains__(self, choice: ChoiceState) -> bool:
        return choice.id in self._fresh or choice.id in self._returned

    def push(self, choice: ChoiceState) -> None:
        self._fresh[choice.id] = choice
        self._count(choice)
        self.order.push(choice.request.account, choice.id, choice.request.spec.priority)

    def push_again(self, choice: ChoiceState) -> None:
        """:meth:`push` for a choice of a snapshot."""
        self._fresh[choice.id] = choice
        self._count(choice)
        self.order.push_again(choice.request.account, choice.id, choice.request.spec.priority)

    def push_returned(self, choice: ChoiceState) -> None:
        self._returned[choice.id] = choice
        self._count(choice)

    def _count(self, choice: ChoiceState) -> None:
        tokens = len(choice.request.spec.prompt_ids)
        choice.request.account.wait(tokens)
        self.tokens += tokens

    def hold(self, choice: ChoiceState) -> bool:
        """The :meth:`first` choice has no turn, and neither have the other new ones of its tenant, until the order releases them. Returns
        False, and does nothing, for a choice that lost its place."""
        if choice.id in self._returned:
            return False
        self.order.hold(choice.request.account)
        return True

    def first(self, now: float) -> ChoiceState | None:
        """The choice whose turn it is."""
        for choice in self._returned.values():
            return choice
        id = self.order.first(now)
        return self._fresh[id] if id is not None else None

    def send(self, choice: ChoiceState, now: float) -> None:
        """The :meth:`first` choice leaves for a replica. A choice that lost its place has had its turn: its tenant paid for it then."""
        fresh = choice.id in self._fresh
        self.remove(choice)
        if fresh:
            self.order.note_sent(choice.request.account, choice.request.spec.priority, choice.known, now)

    def remove(self, choice: ChoiceState) -> None:
        tokens = len(choice.request.spec.prompt_ids)
        choice.request.account.stop_waiting(tokens)
        self.tokens -= tokens
        if self._fresh.pop(choice.id, None) is None:
            del self._returned[choice.id]
        else:
            self.order.remove(choice.request.account, choice.id, choice.request.spec.priority)

    def since(self, moment: float) -> list[ChoiceState]:
        """Choices that wait since ``moment`` or before; the later ones are not looked at."""
        found: list[ChoiceState] = []
        for choices in (self._returned, self._fresh):
            for choice in choices.values():
                if choice.queued_at > moment:
                    break
                found.append(choice)
        return found

    def ids(self) -> tuple[list[int], list[int]]:
        """Ids of the choices that lost their place, and of the new ones, each in the order of their times."""
        return list(self._returned), list(self._fresh)

    def check(self) -> None:
        """Assert that exactly the new choices wait for their turn."""
        self.order.check(len(self._fresh))
