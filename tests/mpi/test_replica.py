"""Replicas as real gangs: mpiexec, ranks, sockets and signals, on FakeEngine, whose every token the oracle knows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gang import MPIEXEC, Gang, RouterEnd, cpu_seconds, short_folder
from tests.support.tiny_models import tiny_model
from workers.engines.fake import expected_tokens
from workers.protocol.messages import Attach, Bye, Cancel, Credit, Done, Failed, SamplingParams
from workers.protocol.specs import FakeOptions, FakeSpec, PortableSpec

pytestmark = pytest.mark.mpi

LONG = SamplingParams(temperature=0.0, max_tokens=30_000)
SLOW = FakeSpec(options=FakeOptions(fake_step_ms=20.0))


def greedy(count: int, seed: int = 0) -> SamplingParams:
    return SamplingParams(temperature=0.8, seed=seed, max_tokens=count)


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def end(folder: Path) -> Iterator[RouterEnd]:
    with RouterEnd(f"ipc://{folder}/a") as router:
        yield router


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_tokens_are_the_oracles_and_sigterm_ends_in_order(folder: Path, end: RouterEnd, tp: int) -> None:
    with Gang(folder, [end.endpoint], tp=tp) as gang:
        end.ready()
        hello = end.hellos[0]
        assert (hello.replica, hello.model, hello.epoch, hello.resume, hello.capacity.tp) == ("r0", "m", 1, "bitwise", tp)
        state = gang.state
        assert (state.phase, state.capacity) == ("ready", hello.capacity) and [rank for rank, _, _ in state.pids] == list(range(tp))
        prompts = [[i + 1, 2, 3, i + 7] for i in range(16)]
        streams = [end.submit(i, prompt, greedy(24, seed=i)) for i, prompt in enumerate(prompts)]
        end.until(lambda: all(stream.end for stream in streams))
        for i, (stream, prompt) in enumerate(zip(streams, prompts, strict=True)):
            assert stream.tokens == expected_tokens(prompt, greedy(24, seed=i))
            assert [(a.seed, a.prompt_tokens) for a in stream.accepted] == [(i, 4)]
            assert isinstance(stream.end, Done) and stream.end.reason == "length" and stream.end.usage.output_tokens == 24
        end.until(lambda: end.beats and end.beats[-1].stats.output_tokens_total == 16 * 24)
        os.kill(gang.pid(0), signal.SIGTERM)
        end.until(lambda: end.byes == ["drained"])
        assert gang.wait_exit() == 0
        gang.wait_gone()
        assert gang.state.phase == "stopped" and gang.state.error is None


def test_cancel_credit_deadline_attach_and_malformed_frames(folder: Path, end: RouterEnd) -> None:
    with Gang(folder, [end.endpoint], engine=FakeSpec(options=FakeOptions(fake_step_ms=2.0))) as gang:
        end.ready()
        for frame in (b"", b"\xc1", b"\x81\xa4type\xa4nope", os.urandom(200)):
            end.send_raw(frame)
        end.send_raw(b"two", b"frames")
        sequence = end.submit(1, [5], LONG)
        end.until(lambda: len(sequence.tokens) >= 5)
        end.send(Cancel(boot=end.boot, stream=1, attempt=0))
        end.until(lambda: sequence.end)
        assert (
            isinstance(sequence.end, Done)
            and sequence.end.reason == "cancelled"
            and sequence.end.usage.output_tokens == len(sequence.tokens)
        )

        slow = end.submit(2, [6], greedy(20), credit=3)
        end.until(lambda: len(slow.tokens) == 3)
        begin, beats = time.monotonic(), len(end.beats)
        end.until(lambda: len(end.beats) > beats + 2)
        assert len(slow.tokens) == 3 and time.monotonic() > begin
        end.send(Credit(boot=end.boot, streams=[2, 99], tokens=[100, 1]))
        end.until(lambda: slow.end)
        assert slow.tokens == expected_tokens([6], greedy(20))

        late = end.submit(3, [7], LONG, deadline_ms=150)
        assert end.until(lambda: late.end) < 5
        assert isinstance(late.end, Failed) and late.end.code == "deadline_exceeded"

        # Another stream takes over a live sequence; then a newer attempt with the journal replaces it.
        old = end.submit(4, [8], greedy(600), request="moving")
        end.until(lambda: len(old.tokens) >= 20)
        moved = end.watch(5, 1, have=7)
        end.send(Attach(boot=end.boot, stream=5, attempt=1, client="c", request_id="moving", have=7))
        end.until(lambda: old.end and len(moved.tokens) >= 40)
        assert isinstance(old.end, Failed) and old.end.code == "cancelled"
        journal = (old.tokens[:7] + moved.tokens)[:30]
        newest = end.submit(6, [8], greedy(600), request="moving", attempt=2, emitted=journal)
        end.until(lambda: newest.end and moved.end)
        oracle = expected_tokens([8], greedy(600))
        assert old.tokens == oracle[: len(old.tokens)] and moved.tokens == oracle[7 : 7 + len(moved.tokens)]
        assert isinstance(moved.end, Failed) and moved.end.code == "cancelled" and newest.tokens == oracle[30:]
        end.until(lambda: end.beats[-1].stats.running == 0 and end.beats[-1].stats.free_blocks == end.hellos[-1].capacity.num_blocks)
        assert gang.state.phase == "ready"
    assert "refused a message" in gang.logs()


def test_a_drain_refuses_the_new_finishes_what_it_can_and_fails_the_rest(folder: Path, end: RouterEnd) -> None:
    with Gang(folder, [end.endpoint], engine=SLOW, drain_grace_s=1.5) as gang:
        end.ready()
        short, endless = end.submit(1, [1], greedy(30)), end.submit(2, [2], LONG)
        end.until(lambda: short.tokens and endless.tokens)
        os.kill(gang.pid(0), signal.SIGTERM)
        end.until(lambda: end.beats[-1].draining)
        assert gang.state.phase == "draining"
        refused = end.submit(3, [3], greedy(5))
        end.until(lambda: refused.end and short.end and endless.end)
        assert isinstance(refused.end, Failed) and refused.end.code == "overloaded" and not refused.accepted
        assert isinstance(short.end, Done) and short.tokens == expected_tokens([1], greedy(30))
        assert isinstance(endless.end, Failed) and endless.end.code == "replica_lost"
        assert endless.tokens == expected_tokens([2], LONG, len(endless.tokens))
        assert gang.wait_exit() == 0 and gang.state.phase == "stopped"


@pytest.mark.parametrize("target", ["leader", "mpiexec"])
def test_a_second_sigterm_is_immediate(folder: Path, end: RouterEnd, target: str) -> None:
    with Gang(folder, [end.endpoint], engine=SLOW) as gang:
        end.ready()
        sequence = end.submit(1, [1], LONG)
        end.until(lambda: sequence.tokens)
        pid = gang.mpiexec.pid if target == "mpiexec" else gang.pid(0)
        os.kill(pid, signal.SIGTERM)
        end.until(lambda: end.beats[-1].draining)
        assert sequence.end is None
        os.kill(pid, signal.SIGTERM)
        end.until(lambda: sequence.end)
        assert isinstance(sequence.end, Failed) and sequence.end.code == "replica_lost"
        gang.wait_gone()
        assert gang.wait_exit() == 0 and gang.state.phase == "stopped"


@pytest.mark.parametrize("victim", ["rank", "leader", "mpiexec"])
def test_the_death_of_any_process_ends_the_whole_gang(folder: Path, end: RouterEnd, victim: str) -> None:
    with Gang(folder, [end.endpoint], tp=3, engine=SLOW) as gang:
        end.ready()
        sequence = end.submit(1, [1], LONG)
        end.until(lambda: sequence.tokens)
        os.kill({"rank": gang.pid(1), "leader": gang.pid(0), "mpiexec": gang.mpiexec.pid}[victim], signal.SIGKILL)
        print(f"{victim}: gone after {gang.wait_gone():.3f} s")
        assert gang.wait_exit() != 0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_while_loading_ends_the_gang(folder: Path, victim: int) -> None:
    with Gang(folder, [], engine=PortableSpec(), artifact=str(tiny_model(folder / "tiny"))) as gang:
        gang.wait_phase("loading")
        os.kill(gang.pid(victim), signal.SIGKILL)
        print(f"loading: gone after {gang.wait_gone():.3f} s")
        assert gang.state.phase == "loading"


def test_sigterm_while_loading_stops_at_once(folder: Path) -> None:
    with Gang(folder, [], engine=PortableSpec(), artifact=str(tiny_model(folder / "tiny"))) as gang:
        gang.wait_phase("loading")
        os.kill(gang.pid(0), signal.SIGTERM)
        assert gang.wait_exit() == 0 and gang.state.phase == "stopped" and gang.state.capacity is None
        gang.wait_gone()


def test_a_stale_gang_ends_and_says_why(folder: Path, end: RouterEnd) -> None:
    with Gang(folder, [end.endpoint]) as gang:
        end.ready().send(Bye(boot=end.boot, reason="stale"))
        assert gang.wait_exit() == 5
        gang.wait_gone()
        error = gang.state.error
        assert gang.state.phase == "failed" and error is not None and error.code == "replica_lost" and "newer epoch" in error.what


def test_a_stopped_rank_stalls_the_step_and_the_leader_ends_the_gang(folder: Path, end: RouterEnd) -> None:
    with Gang(folder, [end.endpoint], hang_floor_s=1.0) as gang:
        end.ready()
        sequence = end.submit(1, [1], LONG)
        end.until(lambda: sequence.tokens)
        os.kill(gang.pid(1), signal.SIGSTOP)
        end.until(lambda: end.beats[-1].busy_ms > 300)  # heartbeats go on inside the hanging step
        end.until(lambda: end.byes)
        gang.wait_gone()
        error = gang.state.error
        assert gang.state.phase == "failed" and error is not None and error.code == "engine_fault" and "no progress" in error.what


def test_a_dead_routers_sequences_are_cancelled_unless_another_attaches(folder: Path, end: RouterEnd) -> None:
    with RouterEnd(f"ipc://{folder}/b", name="b", boot="router-b") as other, Gang(folder, [end.endpoint, other.endpoint], engine=SLOW):
        end.ready()
        other.ready()
        kept, left = end.submit(1, [1], LONG, request="kept"), end.submit(2, [2], LONG, request="left")
        bystander = other.submit(3, [3], LONG)
        end.until(lambda: len(kept.tokens) > 3 and left.tokens)
        end.close()
        moved = other.watch(9, 1, have=2)
        other.send(Attach(boot=other.boot, stream=9, attempt=1, client="c", request_id="kept", have=2))
        took = other.until(lambda: other.beats and other.beats[-1].stats.running == 2 and len(moved.tokens) > 20)
        print(f"orphan gone after {took:.2f} s")
        assert moved.tokens == expected_tokens([1], LONG, 2 + len(moved.tokens))[2:]
        assert bystander.end is None and bystander.tokens == expected_tokens([3], LONG, len(bystander.tokens))

        # A router that comes back at the same address is greeted again, and may take over what lives.
        with RouterEnd(end.endpoint, boot="router-2") as again:
            again.ready()
            assert again.hellos[-1].epoch == 1
            back = again.watch(1, 2, have=0)
            again.send(Attach(boot=again.boot, stream=1, attempt=2, client="c", request_id="kept", have=0))
            again.until(lambda: len(back.tokens) > 2 + len(moved.tokens))
            assert back.tokens == expected_tokens([1], LONG, len(back.tokens))


def test_a_silent_router_is_lost_and_a_new_one_is_learned_from_peers(folder: Path, end: RouterEnd) -> None:
    other = RouterEnd(f"ipc://{folder}/b", name="b", boot="router-b", peers=[end.endpoint, f"ipc://{folder}/b", "tcp://127.0.0.1:9"])
    with other, Gang(folder, [other.endpoint], engine=SLOW) as gang:
        other.ready()
        while not end.replicas:  # the other router's heartbeats name this one
            end.turn()
            other.turn()
        sequence = end.submit(1, [1], LONG)
        while not sequence.tokens:
            end.turn()
            other.turn()
        other.until(lambda: other.beats[-1].stats.running == 1)
        other.until(lambda: other.beats[-1].stats.running == 0)  # its router is not served meanwhile
        end.until(lambda: len(end.hellos) == 2)
        assert gang.state.phase == "ready"
    assert "a peer that cannot be used" in gang.logs()


def test_idle_ranks_leave_the_cores_alone(folder: Path, end: RouterEnd) -> None:
    with Gang(folder, [end.endpoint], tp=3) as gang:
        end.ready()
        sequence = end.submit(1, [1], greedy(5))
        end.until(lambda: sequence.end)
        pids = [pid for _, _, pid in gang.state.pids]
        before, begin = [cpu_seconds(pid) for pid in pids], time.monotonic()
        beats = len(end.beats)
        end.until(lambda: len(end.beats) >= beats + 10)
        took = time.monotonic() - begin
        used = [(cpu_seconds(pid) - start) / took for pid, start in zip(pids, before, strict=True)]
        print("idle cores a rank:", [f"{share:.3f}" for share in used])
        assert max(used) < 0.15


def test_a_world_of_the_wrong_size_is_named(folder: Path) -> None:
    with Gang(folder, [], tp=3, ranks=2) as gang:
        assert gang.wait_exit() == 4
        assert "error: the layout needs 3 ranks and the world has 2" in gang.terminal()
        assert gang.state.phase == "failed"


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_the_portable_engine_serves_drains_and_dies_like_the_fake_one(folder: Path, end: RouterEnd, tp: int, pp: int) -> None:
    model = tiny_model(folder / "tiny")
    engine = PortableSpec(max_batch_size=8, max_num_tokens=64, kv_tokens=1024)
    prompts, params = [[i + 1, 2, 3, 4] for i in range(4)], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with Gang(folder, [end.endpoint], tp=tp, pp=pp, engine=engine, artifact=str(model)) as gang:
        end.ready()
        assert end.hellos[0].capacity.engine == "portable" and end.hellos[0].capacity.vocab_size == 320
        together = [end.submit(i, prompt, params) for i, prompt in enumerate(prompts)]
        end.until(lambda: all(sequence.end for sequence in together))
        alone = []
        for i, prompt in enumerate(prompts):
            sequence = end.submit(10 + i, prompt, params, request=f"alone{i}")
            end.until(lambda sequence=sequence: sequence.end)  # type: ignore[misc]
            alone.append(sequence)
        assert [sequence.tokens for sequence in together] == [sequence.tokens for sequence in alone] and len(
            {tuple(sequence.tokens) for sequence in alone}
        ) > 1
        # A journal continues the same stream.
        rest = end.submit(20, prompts[0], params, request="rest", emitted=alone[0].tokens[:5])
        end.until(lambda: rest.end)
        assert rest.tokens == alone[0].tokens[5:]
        os.kill(gang.pid(0), signal.SIGTERM)
        end.until(lambda: end.byes == ["drained"])
        assert gang.wait_exit() == 0 and gang.state.phase == "stopped"


def test_a_portable_gang_ends_whole_when_a_rank_dies_in_a_step(folder: Path, end: RouterEnd) -> None:
    model = tiny_model(folder / "tiny")
    engine = PortableSpec(max_batch_size=8, max_num_tokens=64, kv_tokens=1024)
    with Gang(folder, [end.endpoint], engine=engine, artifact=str(model)) as gang:
        end.ready()
        sequence = end.submit(1, [1, 2], SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True))
        end.until(lambda: sequence.tokens)
        os.kill(gang.pid(1), signal.SIGKILL)
        print(f"portable: gone after {gang.wait_gone():.3f} s")


def test_a_missing_model_is_reported_by_every_rank_and_ends_the_gang(folder: Path) -> None:
    with Gang(folder, [], engine=PortableSpec(), artifact=str(folder / "nothing")) as gang:
        assert gang.wait_exit() == 3
        error = gang.state.error
        assert gang.state.phase == "failed" and error is not None and (error.code, error.exit_code) == ("artifact_error", 3)
        assert all("nothing" in (gang.run_dir / f"rank{rank}.log").read_text() for rank in range(2))
        assert gang.terminal().startswith("error: ")


def test_a_rank_that_fails_alone_ends_the_world(folder: Path) -> None:
    script = f"""
import sys, workers.rank, workers.__main__ as main
build = workers.rank.build
def failing(spec, comm):
    if comm.Get_rank() == 1:
        raise MemoryError("no room for the shard")
    return build(spec, comm)
workers.rank.build = failing
sys.exit(main.main(["--engine", "fake", "--tp-size", "2", "--run-dir", {str(folder)!r}]))
"""
    ran = subprocess.run([MPIEXEC, "-n", "2", sys.executable, "-c", script], timeout=60, capture_output=True, check=False)
    assert ran.returncode == 5
    log = (folder / "rank1.log").read_text()
    assert "rank 1 failed: MemoryError: no room for the shard" in log and "Traceback" in log
