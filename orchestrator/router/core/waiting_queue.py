"""The order in which choices wait for a replica. Owns one model's queue; :mod:`orchestrator.router.core.request_table` moves choices in
and out."""

from __future__ import annotations

from collections import OrderedDict

from orchestrator.router.core.choice_state import ChoiceState


class WaitingQueue:
    """One model's queue. Choices that lost their place go before new ones; each group is in the order of its times."""

    __slots__ = ("_fresh", "_returned")

    def __init__(self) -> None:
        self._returned: OrderedDict[int, ChoiceState] = OrderedDict()
        self._fresh: OrderedDict[int, ChoiceState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._returned) + len(self._fresh)

    def __contains__(self, choice: ChoiceState) -> bool:
        return choice.id in self._fresh or choice.id in self._returned

    def push(self, choice: ChoiceState) -> None:
        self._fresh[choice.id] = choice

    def push_returned(self, choice: ChoiceState) -> None:
        self._returned[choice.id] = choice

    def first(self) -> ChoiceState | None:
        for choices in (self._returned, self._fresh):
            for choice in choices.values():
                return choice
        return None

    def remove(self, choice: ChoiceState) -> None:
        if self._fresh.pop(choice.id, None) is None:
            del self._returned[choice.id]

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
        """Ids of the choices that lost their place, and of the new ones."""
        return list(self._returned), list(self._fresh)
