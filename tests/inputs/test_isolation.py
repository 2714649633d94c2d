"""One request or one replica against everybody: a real router process, a replica that lies over a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.figures import figure
from tests.support.gang import short_folder, wait_for
from tests.support.impostor import CAPACITY, Impostor, dealer
from tests.support.router_process import RouterRun
from workers.protocol import messages
from workers.protocol.messages import Accepted, Attach, Done, RouterHeartbeat, Submit, Tokens, Usage

#: The default limit of a body.
LARGE = 4_100_000
HEALTH_S = 2.0


class Place:
    """A router with the replicas ``liar`` and, after :meth:`join`, ``good``; both beat."""

    def __init__(self, url: str, liar: Impostor, good: Impostor) -> None:
        self.url, self.liar, self.good = url, liar, good
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._beating = [liar]
        self._thread = threading.Thread(target=self._beat)
        self._thread.start()

    def _beat(self) -> None:
        while not self._over.wait(0.2):
            for replica in list(self._beating):
                self.tell(replica)

    def tell(self, replica: Impostor, *said: Any) -> None:
        """Send what is ``said``, or a heartbeat: a socket is used by one thread at a time."""
        with self._lock:
            for message in said:
                replica.tell(message)
            if not said:
                replica.beat()

    def hear(self, replica: Impostor, kind: type[Any]) -> Any:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with self._lock:
                message = messages.decode_to_replica(replica._socket.recv()) if replica._socket.poll(20) else None
            if isinstance(message, kind):
                return message
        raise AssertionError(f"no {kind.__name__}")

    def join(self) -> None:
        with self._lock:
            self.good.hello("good")
            self.good.hear(RouterHeartbeat)
            self.good.beat()
        self._beating.append(self.good)

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def ask(self) -> dict[str, Any]:
        body = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "return_token_ids": True}
        answer: dict[str, Any] = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60, trust_env=False).json()
        return answer

    def accept(self, replica: Impostor, submit: Submit | Attach) -> None:
        self.tell(replica, Accepted(boot=replica.boot, stream=submit.stream, attempt=submit.attempt))

    def emit(self, replica: Impostor, submit: Submit | Attach, first: int, ids: list[int]) -> None:
        self.tell(replica, Tokens(boot=replica.boot, streams=[submit.stream], attempts=[submit.attempt], firsts=[first], tokens=[ids]))


@pytest.fixture
def place() -> Iterator[Place]:
    with short_folder() as folder, RouterRun(folder, http=True, hang_floor_s=1.5, replica_timeout_s=60.0) as router:
        state = router.wait_serving()
        with dealer(state.back) as first, dealer(state.back) as second:
            liar, good = Impostor(first, "boot-liar"), Impostor(second, "boot-good")
            liar.hello("liar")
            liar.hear(RouterHeartbeat)
            liar.beat()
            found = Place(state.http, liar, good)
            try:
                yield found
            finally:
                found.close()


@pytest.mark.parametrize("lie", ["an id", "too many", "nothing", "no end", "a short end"])
def test_what_a_liar_sends_reaches_no_client(place: Place, lie: str) -> None:
    """Z7 and Z8: the answer is the good replica's, the liar is in quarantine."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(place.ask)
        submit = place.hear(place.liar, Submit)
        place.join()
        begun = time.monotonic()
        place.accept(place.liar, submit)
        if lie == "an id":
            place.emit(place.liar, submit, 0, [65, CAPACITY.vocab_size])
        elif lie == "too many":
            place.emit(place.liar, submit, 0, [66] * 5)
        elif lie == "no end":
            place.emit(place.liar, submit, 0, [65, 66, 67, 68])
        elif lie == "a short end":
            place.emit(place.liar, submit, 0, [65])
            usage = Usage(prompt_tokens=3, output_tokens=0)
            place.tell(place.liar, Done(boot="boot-liar", stream=submit.stream, attempt=submit.attempt, reason="stop", usage=usage))
        if lie in ("nothing", "no end"):
            # It is questioned, and says that all is well.
            place.accept(place.liar, place.hear(place.liar, Attach))
        if lie != "no end":  # there, nothing is left to be done
            again = place.hear(place.good, Submit)
            place.accept(place.good, again)
            have = again.task.emitted
            place.emit(place.good, again, len(have), [65, 66, 67, 68][len(have) :])
            usage = Usage(prompt_tokens=3, output_tokens=4)
            place.tell(place.good, Done(boot="boot-good", stream=again.stream, attempt=again.attempt, reason="length", usage=usage))
        answer = asked.result(30)
    figure(f"Z7, Z8 {lie} -> the whole answer", time.monotonic() - begun, 6.0)
    assert answer["choices"][0]["token_ids"] == [65, 66, 67, 68] and answer["usage"]["completion_tokens"] == 4
    rows = httpx.get(f"{place.url}/status", trust_env=False).json()["replicas"]
    assert {row["name"]: row["quarantined"] for row in rows} == {"liar": True, "good": False}
    assert next(row["reason"] for row in rows if row["name"] == "liar")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("1 ", marks=pytest.mark.long, id="ones"),
        pytest.param("one more word ", marks=pytest.mark.long, id="words"),
        "\U0001f600",
    ],
)
def test_a_large_text_at_tokenize_lets_the_router_answer(text: str) -> None:
    """Z1: probes are answered while the text of one caller is encoded."""
    prompt = text * (LARGE // len(text.encode()))
    with short_folder() as folder, RouterRun(folder, http=True) as router, ThreadPoolExecutor(1) as pool:
        url = router.wait_serving().http
        asked = pool.submit(lambda: httpx.post(f"{url}/tokenize", json={"model": "m", "prompt": prompt}, timeout=120, trust_env=False))
        longest, probes = 0.0, 0
        with httpx.Client(trust_env=False, timeout=60) as client:
            while not asked.done():
                begun = time.monotonic()
                assert client.get(f"{url}/health").status_code == 200
                longest, probes = max(longest, time.monotonic() - begun), probes + 1
                time.sleep(0.02)
        answer = asked.result()
    assert answer.status_code in (200, 400, 413) and probes >= 3
    figure(f"Z1 /health while 4.1 MB of {text.strip()!r} are encoded", longest, HEALTH_S)


def test_a_farewell_of_megabytes_is_refused(place: Place) -> None:
    """Z9: what is not bounded is not read; the router goes on."""
    place.liar._socket.send(b"\x83\xa4type\xa3bye\xa4boot\xa9boot-liar\xa6reason\xdb" + (7_000_000).to_bytes(4, "big") + b"x" * 7_000_000)
    begun = time.monotonic()
    for _ in range(5):
        assert httpx.get(f"{place.url}/health", trust_env=False, timeout=20).status_code == 200
    figure("Z9 five probes beside 7 MB of text", time.monotonic() - begun, HEALTH_S)
    wait_for(lambda: httpx.get(f"{place.url}/ready", trust_env=False).status_code == 200, what="the replica, which never left")
