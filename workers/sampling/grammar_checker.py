"""Compiles a grammar in a child process before the leader does, because a grammar that overflows the stack or never ends must not end a
gang.

Owns that child process: it starts at the first guided request, is replaced after a grammar has killed it, and dies with its parent. The
kernel counts the processor time of each trial, so a busy machine refuses no grammar that an idle one accepts. The trial only shows that
compiling is harmless; the leader compiles the grammar again and decides whether it is valid.
"""

from __future__ import annotations

import hashlib
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import msgspec

from workers.process import die_with_parent
from workers.protocol.errors import Overloaded, Rejected, Unsupported
from workers.protocol.messages import GuideSpec
from workers.protocol.running_clock import LONGEST_TURN_S, RunningClock
from workers.sampling.guide import Guide, GuideFactory

#: Maximum processor time for compiling a grammar and computing its first mask, seconds.
TRY_CPU_S = 1.0
#: Longest wait for an answer and for the child's start, seconds: far more than either takes, to allow for a busy machine.
ANSWER_S, START_S = 10.0, 30.0
#: Address space of the child, and stack of a trial: half of the stack of the leader's thread, which calls at a greater depth.
MEMORY, STACK = 2 << 30, 4 << 20
#: Number of cached results.
REMEMBERED = 1024

_HEAD = 4
_READY = b"\1"


class Tokenizer(msgspec.Struct, frozen=True):
    """The tokenizer that both processes compile for, as in :func:`workers.sampling.llguidance_guide.guide_factory`."""

    file: str
    vocab_size: int
    eos_ids: list[int]


class GrammarChecker:
    """Tests whether compiling a grammar is harmless; called from one thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._verdicts: OrderedDict[bytes, bool] = OrderedDict()
        #: The process; None before the first grammar.
        self.child: subprocess.Popen[bytes] | None = None

    def check(self, spec: GuideSpec) -> None:
        """Raises :class:`Rejected` for a grammar that needs too much time or memory, Unsupported if the tokenizer cannot be used, and
        Overloaded if the child does not answer now."""
        key = hashlib.sha256(msgspec.msgpack.encode(spec)).digest()
        harmless = self._verdicts.get(key)
        if harmless is None:
            harmless = self._verdicts[key] = self._try_in_child(spec)
            if len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)
        if not harmless:
            raise Rejected(
                f"the {spec.noun} cannot be followed", "compiling it takes too much time or memory", "ask for less",
                code="invalid_schema", param="guide",
            )  # fmt: skip

    def _try_in_child(self, spec: GuideSpec) -> bool:
        if self.child is None or self.child.poll() is not None:
            self.child = self._start()
        if not self._send(self.child, spec):
            raise _no_answer("it ended between two grammars")
        return self._receive(self.child, ANSWER_S)

    def _start(self) -> subprocess.Popen[bytes]:
        # Started in the folder that holds the package, whatever this process's working folder.
        child = subprocess.Popen(
            [sys.executable, "-m", "workers.sampling.grammar_checker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=Path(__file__).parents[2],
        )
        weakref.finalize(self, _end, child)
        if not self._send(child, self._tokenizer) or not self._receive(child, START_S):
            raise Unsupported("guided output is not offered", f"{self._tokenizer.file} cannot be used for it", param="response_format")
        return child

    def _send(self, child: subprocess.Popen[bytes], message: GuideSpec | Tokenizer) -> bool:
        """Whether the child has read the grammar; the child reads whenever it does not compile."""
        data = msgspec.msgpack.encode(message)
        assert child.stdin is not None
        try:
            with memoryview(len(data).to_bytes(_HEAD, "little") + data) as frame:
                sent = 0
                while sent < len(frame):
                    sent += child.stdin.write(frame[sent:]) or 0
        except BrokenPipeError:
            return False
        return True

    def _receive(self, child: subprocess.Popen[bytes], bound_s: float) -> bool:
        """True = the trial succeeded; False = the child ended. Raises :class:`Overloaded` after ``bound_s`` seconds."""
        assert child.stdout is not None
        begin = time.monotonic()
        clock = RunningClock(begin)
        while not select.select([child.stdout], [], [], LONGEST_TURN_S / 2)[0]:
            clock.turn(time.monotonic())
            if clock.at(time.monotonic()) - begin > bound_s:
                _end(child)
                raise _no_answer(f"no answer within {bound_s:g} s")
        if child.stdout.read(1) == _READY:
            return True
        _end(child)
        return False


def _no_answer(why: str) -> Overloaded:
    return Overloaded("the process that tries grammars does not answer", why, "try again", retry_after=1.0)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()


def compiler(file: Path, vocab_size: int, eos_ids: Sequence[int]) -> GuideFactory | None:
    """A :data:`~workers.sampling.guide.GuideFactory` for ``tokenizer.json`` that tests each new grammar in the child first; None if that
    file or llguidance is missing. The child and the tokenizer's trie (44 MB for 49,152 tokens) are created at the first guided request."""
    if not file.exists() or find_spec("llguidance") is None:
        return None
    checker = GrammarChecker(Tokenizer(str(file), vocab_size, list(eos_ids)))
    made: list[GuideFactory] = []

    def compile_guide(spec: GuideSpec) -> Guide:
        checker.check(spec)
        if not made:
            from workers.sampling.llguidance_guide import guide_factory

            made.append(guide_factory(file, vocab_size, eos_ids))
        return made[0](spec)

    return compile_guide


# the child


def _read(size: int) -> bytes:
    """Exactly ``size`` bytes from the parent; ends this process if the parent is gone."""
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            os._exit(0)
        data += part
    return data


def _frame() -> bytes:
    return _read(int.from_bytes(_read(_HEAD), "little"))


def _try(factory: GuideFactory, spec: GuideSpec) -> bool:
    """Compile, with the first mask, on a small stack and within the time limit; a grammar that is refused within it is harmless too."""
    harmless = False

    def work() -> None:
        nonlocal harmless
        with suppress(Rejected):
            factory(spec)
        harmless = True

    signal.setitimer(signal.ITIMER_PROF, TRY_CPU_S)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    signal.setitimer(signal.ITIMER_PROF, 0.0)
    return harmless


def main() -> None:
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the parent; this process ends with it
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the time limit of a trial: ends the process
    from workers.sampling.llguidance_guide import guide_factory

    tokenizer = msgspec.msgpack.decode(_frame(), type=Tokenizer)
    factory = guide_factory(Path(tokenizer.file), tokenizer.vocab_size, tokenizer.eos_ids)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK)
    os.write(1, _READY)
    while _try(factory, msgspec.msgpack.decode(_frame(), type=GuideSpec)):
        os.write(1, _READY)


if __name__ == "__main__":
    main()
