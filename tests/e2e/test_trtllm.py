"""The whole stack over the faked TensorRT-LLM: controller, mpiexec with tp=2 x pp=2 ranks of an engine, router, HTTP; and a model that has
one replica of engine shards and one of the portable engine, each going on where the other died."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
import pytest
import yaml

from orchestrator.client import AsyncClient
from orchestrator.control.host.control_socket import DeploymentStatus
from tests.support.deployment import deployed, wait_for_state
from tests.support.trtllm_host import FAKES, checkpoint_of, engine_of, pretend
from workers.engines.fake import expected_tokens
from workers.engines.portable import build
from workers.engines.trtllm.build_options import BuildOptions
from workers.protocol.messages import GenerateTask, SamplingParams, Submit
from workers.protocol.specs import PortableSpec, ReplicaSpec

OUTPUT = 300
#: Tokens of each answer that a client holds before its replica dies.
BEGUN = 20
#: Four GPUs like the one that the engine was built on.
GPUS = msgspec.json.encode([["NVIDIA H100 80GB HBM3", "9.0", 81559, 81000]] * 4).decode()
#: Twice as many requests as a replica has sequences, so both must serve: it queues one ahead.
ASKED = 8
LIMITS: dict[str, object] = {"max_seq_len": 1024, "kv_tokens": 32768, "max_batch_size": 4, "fixed_shape": True}


class Answer(msgspec.Struct):
    tokens: list[int] = []
    reason: str = ""


def write_config(folder: Path, source: Path, engine: Path) -> Path:
    model = {
        "name": "m",
        "path": str(source),
        **LIMITS,
        "replicas": [
            {"name": "shards", "engine": "trtllm", "path": str(engine), "tp_size": 2, "pp_size": 2},
            {"name": "torch", "engine": "portable"},
        ],
        "trtllm": {"start_timeout_s": 120, "kv_cache": {"free_gpu_memory_fraction": 0.8}},
    }
    file = folder / "deployment.yaml"
    http = {"host": "127.0.0.1", "port": 0}
    deployment = {"name": "e2e", "launcher": "local", "http": http, "run_dir": str(folder / "run"), "cache_dir": str(folder / "cache")}
    file.write_text(yaml.safe_dump(deployment | {"hang_floor_s": 5.0, "admission": {"replica_limit": 100}, "models": [model]}))
    return file


async def ask(client: AsyncClient, prompt: list[int], max_tokens: int, begun: Callable[[list[int], list[int]], None]) -> Answer:
    """A streamed greedy answer by ids, without gap or repeat; ``begun`` is told (prompt, tokens) once it holds BEGUN tokens."""
    answer, told = Answer(), False
    async for piece in client.complete(prompt, texts=False, max_tokens=max_tokens, temperature=0, ignore_eos=True).stream():
        assert piece.first == len(answer.tokens) and not answer.reason, "a gap, a repeat, or something after the end"
        answer.tokens += piece.tokens
        answer.reason = piece.finish_reason or ""
        if not told and len(answer.tokens) >= BEGUN:
            told = True
            begun(prompt, answer.tokens)
    return answer


async def ask_all(status: DeploymentStatus, prompts: list[list[int]], *, victim: int, on_shards: bool) -> list[Answer]:
    """All at once; the process ``victim`` is killed when the first answer of its engine has begun."""
    alive = True

    def begun(prompt: list[int], tokens: list[int]) -> None:
        nonlocal alive
        if alive and (tokens == oracle(prompt, len(tokens))) == on_shards:
            alive = False
            os.kill(victim, signal.SIGKILL)

    async with AsyncClient([address.endpoint for address in status.rpc], model="m") as client, asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(client, prompt, OUTPUT, begun)) for prompt in prompts]
    assert not alive, "no answer began on the victim's engine"
    return [task.result() for task in tasks]


async def ask_http(status: DeploymentStatus, prompts: list[str]) -> list[str]:
    """Streamed texts."""

    async def one(client: httpx.AsyncClient, prompt: str) -> str:
        body = {"model": "m", "prompt": prompt, "stream": True, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        async with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = [line[6:] async for line in stream.aiter_lines() if line.startswith("data: ")]
        assert stream.status_code == 200 and lines[-1] == "[DONE]"
        return "".join(shown["text"] for line in lines[:-1] for shown in msgspec.json.decode(line)["choices"])

    async with httpx.AsyncClient(base_url=status.url, timeout=120, trust_env=False) as client:
        return await asyncio.gather(*(one(client, prompt) for prompt in prompts))


def rank_of(status: DeploymentStatus, replica: str, rank: int) -> int:
    rows = {row.name: row for model in status.models for row in model.replicas}
    return next(pid for number, _, pid in rows[replica].pids if number == rank)


def oracle(prompt: list[int], count: int) -> list[int]:
    return expected_tokens(prompt, SamplingParams(temperature=0.0, max_tokens=count))


def left_at(prompt: list[int], tokens: list[int]) -> int:
    """How many tokens the engine shards gave at the beginning: where the answer leaves the oracle."""
    return next((i for i, (got, want) in enumerate(zip(tokens, oracle(prompt, len(tokens)), strict=True)) if got != want), len(tokens))


def joined_at(prompt: list[int], tokens: list[int]) -> int:
    """How many tokens the portable engine gave before the engine shards went on: from where on the oracle of the known prefix holds."""
    cuts = (cut for cut in range(len(tokens)) if tokens[cut:] == oracle([*prompt, *tokens[:cut]], len(tokens) - cut))
    return next(cuts, len(tokens))


def portable_tokens(model: Path, prompt: list[int], count: int) -> list[int]:
    """What the portable engine says after ``prompt``, in this process; fixed shapes make it the same bits as in a replica."""
    engine = build(ReplicaSpec(name="r", model="m", artifact=str(model), engine=PortableSpec(**LIMITS)), None)  # type: ignore[arg-type]
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    task = GenerateTask(params=params)
    asked = Submit(boot="b", stream=1, attempt=0, client="c", request_id="q", model="m", prompt_ids=prompt, task=task)
    engine.submit(1, asked)  # type: ignore[union-attr]
    tokens: list[int] = []
    while len(tokens) < count:
        tokens += [token for emission in engine.step() for token in emission.tokens]  # type: ignore[union-attr]
    return tokens


def test_requests_go_on_between_engine_shards_and_the_portable_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as name:
        folder = Path(name)
        pretend(monkeypatch)
        checkpoint = checkpoint_of(folder, tp=2, pp=2, max_position=1024)
        engine = engine_of(folder, checkpoint, options=BuildOptions(max_batch_size=32, max_num_tokens=512, max_seq_len=1024))
        file = write_config(folder, folder / "hf", engine.path)
        with deployed(file, path=[FAKES], settings={"FAKE_TRTLLM": "step_ms=8", "FAKE_GPUS": GPUS}) as (control, status):
            capacity = {row.name: row.capacity for model in status.models for row in model.replicas}
            shards, portable = capacity["shards"], capacity["torch"]
            assert shards is not None and (shards.engine, shards.tp, shards.pp) == ("trtllm", 2, 2)
            assert portable is not None and portable.engine == "portable"
            texts = [f"request {i}" for i in range(ASKED)]
            wanted = [bytes(oracle(list(text.encode()), 60)).decode() for text in texts]
            served = [got == want for got, want in zip(asyncio.run(ask_http(status, texts)), wanted, strict=True)]
            assert 0 < sum(served) < len(texts), "both replicas take requests"

            prompts = [[65 + i, 66, 67, 68 + i] for i in range(ASKED)]
            answers = asyncio.run(ask_all(status, prompts, victim=rank_of(status, "shards", 3), on_shards=True))
            assert all(len(answer.tokens) == OUTPUT and answer.reason == "length" for answer in answers)
            left = [left_at(prompt, answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)]
            crossed = [i for i, at in enumerate(left) if BEGUN <= at < OUTPUT - 16]
            assert crossed, "no answer had begun on the engine shards: the test proved nothing"
            for i in crossed[:2]:
                at, tokens = left[i], answers[i].tokens
                assert tokens[at:] == portable_tokens(folder / "hf", prompts[i] + tokens[:at], OUTPUT - at)

            status = wait_for_state(control, "READY", 90)
            answers = asyncio.run(ask_all(status, prompts, victim=rank_of(status, "torch", 0), on_shards=False))
            assert all(len(answer.tokens) == OUTPUT and answer.reason == "length" for answer in answers)
            joined = [joined_at(prompt, answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)]
            crossed = [i for i, at in enumerate(joined) if BEGUN <= at < OUTPUT - 16]
            assert crossed, "no answer had begun on the portable engine: the test proved nothing"
            # What never was the engine shards' is the portable engine's to its end: nothing else answers.
            whole = [i for i, at in enumerate(joined) if at >= OUTPUT - 16]
            for i in crossed[:2] + whole[:1]:
                assert answers[i].tokens[: joined[i]] == portable_tokens(folder / "hf", prompts[i], joined[i])
