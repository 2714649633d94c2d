"""TensorRT-LLM replicas as real gangs over the faked package: mpiexec, ranks that block in the Executor, the wire, and every way to fail
that users report and a launcher can catch. Tokens are FakeEngine's oracle's, so each stream is checked to the token."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from orchestrator.control.launch.launcher import GangSpec
from orchestrator.control.launch.mpiexec import find_mpi
from orchestrator.control.launch.supervisor import GangSupervisor as Launched
from orchestrator.control.launch.supervisor import LocalNode
from tests.support.gang import Gang, RouterEnd, short_folder, wait_for
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from workers.engines.fake import BYTES_EOS, expected_tokens
from workers.engines.trtllm.sequence import continued_seed
from workers.epoch import make_epoch
from workers.protocol.messages import Cancel, Credit, Done, Failed, SamplingParams
from workers.protocol.specs import Parallel, ReplicaSpec, TrtllmSpec
from workers.protocol.trtllm_options import TrtllmOptions
from workers.scheduler.block_pool import prefix_hashes

pytestmark = pytest.mark.mpi

ROOT = Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests" / "fakes"
ENGINE = TrtllmSpec(options=TrtllmOptions(start_timeout_s=60.0))
#: Bound of an end that must come by itself, seconds; the bounds of what ends it are 2 s.
END_S = 40.0


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def end(folder: Path) -> Iterator[RouterEnd]:
    with RouterEnd(f"ipc://{folder}/a") as router:
        yield router


def engine_folder(folder: Path, *, tp: int = 2, pp: int = 1, version: str = "1.2.1", paged: bool = True, rank1: str = "fine") -> Path:
    """An engine folder as `trtllm-build` leaves it, over the byte vocabulary."""
    path = tiny_tokenizer(folder / "engine")
    mapping = {"world_size": tp * pp, "tp_size": tp, "pp_size": pp}
    model = {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "vocab_size": 320,
        "max_position_embeddings": 2048,
        "mapping": mapping,
    }
    build = {"max_batch_size": 64, "max_num_tokens": 256, "max_input_len": 200, "max_seq_len": 2048, "max_beam_width": 1}
    plugins = {"tokens_per_block": 32, "use_paged_context_fmha": paged}
    config = {"version": version, "pretrained_config": model, "build_config": build | {"plugin_config": plugins}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(BYTES_EOS)}))
    for rank in range(tp * pp):
        (path / f"rank{rank}.engine").write_text(rank1 if rank == 1 else "fine")
    return path


def start(
    folder: Path, end: RouterEnd, artifact: Path, modes: str = "", *, tp: int = 2, pp: int = 1, engine: TrtllmSpec = ENGINE, **more: object
) -> Gang:
    env = {"PYTHONPATH": f"{FAKES}:{ROOT}", "TRIREME_FAKE_TRTLLM": modes, "RAY_LOCAL_WORLD_SIZE": "8", "SLURM_PROCID": "5"}
    return Gang(folder, [end.endpoint], tp=tp, pp=pp, engine=engine, artifact=str(artifact), env=env, **more)  # type: ignore[arg-type]


def params(count: int, **more: object) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": count} | more))  # type: ignore[arg-type]


def bounded(seconds: float) -> TrtllmSpec:
    return msgspec.structs.replace(ENGINE, options=TrtllmOptions(start_timeout_s=seconds))


def test_four_ranks_stream_the_oracles_tokens_and_end_in_order(folder: Path, end: RouterEnd) -> None:
    with start(folder, end, engine_folder(folder, tp=2, pp=2), "cumulative=1", tp=2, pp=2) as gang:
        end.ready()
        hello = end.hellos[0]
        capacity = hello.capacity
        assert hello.resume == "valid" and (capacity.engine, capacity.tp, capacity.pp, capacity.max_seq_len) == ("trtllm", 2, 2, 2048)
        assert (capacity.block_size, capacity.num_blocks, capacity.max_logprobs, capacity.guided) == (32, 2048, 0, False)
        asked = [
            params(24), params(24, temperature=0.8, seed=7), params(200, stop_ids=(75,)), params(200, stop_ids=(75,), min_tokens=120),
            params(24, logprobs=0),
        ]  # fmt: skip
        prompts = [[i + 1, 2, 3] for i in range(len(asked))]
        streams = [end.submit(i, prompt, each) for i, (prompt, each) in enumerate(zip(prompts, asked, strict=True))]
        long = end.submit(90, list(range(32, 112)), params(4))
        end.until(lambda: all(stream.end for stream in [*streams, long]))
        for stream, prompt, each in zip(streams, prompts, asked, strict=True):
            assert stream.tokens == expected_tokens(prompt, each, eos_ids=BYTES_EOS)
            assert isinstance(stream.end, Done) and stream.end.usage.output_tokens == len(stream.tokens)
            assert stream.end.reason == ("length" if len(stream.tokens) == each.max_tokens else "stop")
        assert len(streams[2].tokens) < 200, "its stop id never came: the test proved nothing"

        journal = expected_tokens([9], params(40))[:17]
        resumed = end.submit(10, [9], params(40, temperature=0.9, seed=3), emitted=journal)
        held = end.submit(11, [8], params(30), credit=5)
        gone = end.submit(12, [7], params(30_000 // 16))
        end.until(lambda: len(held.tokens) == 5 and len(gone.tokens) > 3)
        end.send(Cancel(boot=end.boot, stream=12))
        end.send(Credit(boot=end.boot, streams=[11], tokens=[100]))
        end.until(lambda: all(stream.end for stream in (resumed, held, gone)))
        seed = continued_seed(3, 17)
        assert resumed.first == 17 and resumed.tokens == expected_tokens([9, *journal], params(23, temperature=0.9, seed=seed))
        assert held.tokens == expected_tokens([8], params(30))

        whole = prefix_hashes(list(range(32, 112)), 32, "")
        end.until(lambda: len(whole) == 2 and set(whole) <= set(end.beats[-1].stats.prefixes) and not end.beats[-1].stats.running)
        assert end.beats[-1].stats.free_blocks == 2048 and end.beats[-1].stats.prompt_tokens_total > 80

        failed = [
            (end.submit(20, list(range(40)) * 60, params(4)), "context_length_exceeded"),
            (end.submit(21, [1], params(4, prompt_logprobs=1)), "unsupported"),
        ]
        end.until(lambda: all(stream.end for stream, _ in failed))
        for stream, code in failed:
            assert isinstance(stream.end, Failed) and stream.end.code == code
        os.kill(gang.pid(0), signal.SIGTERM)
        end.until(lambda: end.byes == ["drained"])
        assert gang.wait_exit() == 0
        gang.wait_gone()
        assert gang.state.phase == "stopped"


def test_one_error_response_fails_one_request(folder: Path, end: RouterEnd) -> None:
    with start(folder, end, engine_folder(folder, tp=1, paged=False), "error=5", tp=1):
        end.ready()
        bad, good = end.submit(1, [5, 6], params(8)), end.submit(2, [6, 5], params(8))
        # Without use_paged_context_fmha an input has the length that the engine was built for.
        over = end.submit(3, [1] * 201, params(8))
        end.until(lambda: bad.end and good.end and over.end)
        assert isinstance(bad.end, Failed) and bad.end.code == "engine_fault" and "ordered to fail" in bad.end.message
        assert good.tokens == expected_tokens([6, 5], params(8))
        assert isinstance(over.end, Failed) and over.end.code == "context_length_exceeded"


#: What goes wrong: (modes, other settings of the engine folder, start bound in s) -> words in the terminal or the state.
STARTS = {
    "a follower raises": ("raise=1", {}, 60.0, "rank 1 could not start TensorRT-LLM"),
    "a follower has no memory": ("oom=1", {}, 60.0, "rank 1 has not enough GPU memory"),
    "a follower dies in its constructor": ("die=construct:1", {}, 60.0, ""),
    "the leader dies while it loads": ("die=load:0", {}, 60.0, ""),
    "a follower never comes back": ("wedge=construct:1", {}, 2.0, "did not start within 2 s"),
    "an engine of another GPU": ("", {"rank1": "built for other GPU"}, 60.0, "rank 1 cannot run its engine: it was built for another GPU"),
    "an engine that only the library finds too old": ("version=1.2.9", {}, 60.0, "another TensorRT version built it"),
}


@pytest.mark.parametrize("what", STARTS)
def test_a_start_that_fails_ends_whole_and_says_why(folder: Path, end: RouterEnd, what: str) -> None:
    modes, changes, bound_s, words = STARTS[what]
    with start(folder, end, engine_folder(folder, **changes), modes, engine=bounded(bound_s)) as gang:  # type: ignore[arg-type]
        assert gang.wait_exit(END_S) != 0
        gang.wait_gone(5.0)
        error = gang.state.error
        told = gang.terminal() + (f"{error.what}: {error.why}" if error is not None else "")
        assert words in told, told


def test_the_launcher_tells_what_the_failed_rank_said(folder: Path) -> None:
    replica = ReplicaSpec(name="r0", model="m", artifact=str(engine_folder(folder)), parallel=Parallel(tp=2), engine=ENGINE)
    env = {**os.environ, "PYTHONPATH": f"{FAKES}:{ROOT}", "TRIREME_FAKE_TRTLLM": "oom=1"}
    spec = GangSpec(deployment="t", replica=replica, run_dir=str(folder / "gangs"))
    gang = Launched(spec, make_epoch(), [LocalNode(2)], mpi=find_mpi(""), env=env)
    gang.start()
    try:
        wait_for(lambda: "rank 1 has not enough GPU memory" in gang.status().cause, END_S, "the cause")
        assert gang.status().phase == "failed" and "free_gpu_memory_fraction" in gang.status().hint
    finally:
        assert gang.kill() == []


#: What is known before TensorRT-LLM starts: all ranks say the same and leave in order.
REFUSALS = {
    "another version": ({"version": "1.1.0"}, "", {}, 3, "is for another TensorRT-LLM"),
    "another layout": ({"tp": 1, "pp": 2}, "", {}, 3, "has another layout"),
    "another world": ({}, "", {"ranks": 3}, 4, "the layout needs 2 ranks and the world has 3"),
    "a library without engines": ({}, "without=executor", {}, 4, "this TensorRT-LLM runs no engines"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_fit_is_refused_before_the_library_starts(folder: Path, end: RouterEnd, what: str) -> None:
    changes, modes, more, code, words = REFUSALS[what]
    with start(folder, end, engine_folder(folder, **changes), modes, **more) as gang:  # type: ignore[arg-type]
        assert gang.wait_exit(END_S) != 0
        gang.wait_gone(5.0)
        assert words in gang.terminal() and "hint: " in gang.terminal()
        if code == 3:
            assert gang.state.phase == "failed" and gang.state.error is not None and gang.state.error.exit_code == code


@pytest.mark.parametrize(
    ("modes", "words"),
    [("die=generate:1,after=30,step_ms=5", ""), ("wedge=generate:1,after=30,step_ms=5", "TensorRT-LLM has made no iteration for")],
)
def test_a_rank_lost_in_generation_ends_the_gang(folder: Path, end: RouterEnd, modes: str, words: str) -> None:
    with start(folder, end, engine_folder(folder), modes, hang_floor_s=2.0) as gang:
        end.ready()
        sequence = end.submit(1, [1], params(1000))
        end.until(lambda: len(sequence.tokens) > 5)
        gang.wait_gone(END_S)
        assert sequence.tokens == expected_tokens([1], params(1000))[: len(sequence.tokens)]
        assert words in gang.terminal()


def test_a_follower_that_is_stopped_is_missed_even_by_an_idle_gang(folder: Path, end: RouterEnd) -> None:
    with start(folder, end, engine_folder(folder), hang_floor_s=2.0) as gang:
        end.ready()
        os.kill(gang.pid(1), signal.SIGSTOP)
        gang.wait_phase("failed")
        assert gang.state.error is not None and "rank 1 has been silent" in gang.state.error.what


def test_a_shutdown_that_hangs_is_bounded(folder: Path, end: RouterEnd) -> None:
    with start(folder, end, engine_folder(folder), "shutdown=hang") as gang:
        end.ready()
        os.kill(gang.pid(0), signal.SIGTERM)
        assert gang.wait_exit(END_S) != 0
        gang.wait_gone(5.0)
        assert gang.state.error is not None and "did not shut down within" in gang.state.error.what


def test_the_llm_api_serves_hugging_face_weights_on_the_same_ranks(folder: Path, end: RouterEnd) -> None:
    model = tiny_model(folder / "hf", max_position=1024)
    with start(folder, end, model, "error=5", engine=msgspec.structs.replace(ENGINE, kv_tokens=4096)) as gang:
        end.ready()
        capacity = end.hellos[0].capacity
        assert (capacity.engine, capacity.block_size, capacity.num_blocks, capacity.max_seq_len) == ("trtllm", 32, 128, 1024)
        asked = [params(24), params(24, temperature=0.8, seed=7), params(150, stop_ids=(75,)), params(8, logprobs=0)]
        streams = [end.submit(i, [i + 1, 2], each) for i, each in enumerate(asked)]
        long, bad = end.submit(5, list(range(32, 112)), params(4)), end.submit(6, [5, 6], params(4))
        gone = end.submit(7, [7], params(900))
        end.until(lambda: len(gone.tokens) > 3)
        end.send(Cancel(boot=end.boot, stream=7))
        end.until(lambda: all(stream.end for stream in (*streams, long, bad, gone)))
        for i, each in enumerate(asked[:3]):
            assert streams[i].tokens == expected_tokens([i + 1, 2], each, eos_ids=BYTES_EOS)
        assert isinstance(streams[3].end, Failed) and streams[3].end.code == "unsupported"
        assert isinstance(bad.end, Failed) and bad.end.code == "engine_fault"
        whole = set(prefix_hashes(list(range(32, 112)), 32, ""))
        end.until(lambda: whole <= set(end.beats[-1].stats.prefixes) and not end.beats[-1].stats.running)
        os.kill(gang.pid(0), signal.SIGTERM)
        assert gang.wait_exit() == 0
        gang.wait_gone()
