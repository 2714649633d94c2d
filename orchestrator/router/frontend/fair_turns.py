"""Fair sharing of a worker pool between callers: waiting callers take turns, one job each.

Owns the waiting jobs. To be used from one event loop only.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairTurns:
    """``count`` jobs run at a time."""

    def __init__(self, count: int) -> None:
        self._free = count
        #: The waiting jobs, in the order of the callers' turns.
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def turn(self, caller: str) -> AsyncIterator[None]:
        """Wait until it is the turn of a job of ``caller``, and let the next one follow when the job is over."""
        await self._take(caller)
        try:
            yield
        finally:
            self._give()

    async def _take(self, caller: str) -> None:
        if self._free:
            self._free -= 1
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.cancelled():
                self._leave(caller, mine)
            else:  # its turn had come already
                self._give()
            raise

    def _leave(self, caller: str, mine: asyncio.Future[None]) -> None:
        queue = self._waiting[caller]
        queue.remove(mine)
        if not queue:
            del self._waiting[caller]

    def _give(self) -> None:
        while self._waiting:
            caller, queue = next(iter(self._waiting.items()))
            following = next((one for one in queue if not one.done()), None)
            if following is None:  # all of them are on their way out
                self._waiting.move_to_end(caller)
                if all(one.done() for queue in self._waiting.values() for one in queue):
                    break
                continue
            queue.remove(following)
            self._waiting.move_to_end(caller)
            if not queue:
                del self._waiting[caller]
            following.set_result(None)
            return
        self._free += 1
