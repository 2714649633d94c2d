"""The portable engine on one rank: sequences end as asked, batch mates are invisible, and replays of the fixed-shape mode are bitwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.reference.engine import margin_violations, request, serve
from tests.support.tiny_models import IM_END, tiny_model
from workers.engines.portable import PortableEngine, build
from workers.protocol.engine import Finish
from workers.protocol.errors import ArtifactError, ConfigError, EnvironmentFault, Rejected
from workers.protocol.messages import GuideSpec, SamplingParams, Submit
from workers.protocol.specs import Parallel, PortableOptions, PortableSpec, ReplicaSpec
from workers.runner.step_time import StepTimeModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), heads=9, kv_heads=3, vocab=321)


def engine_of(folder: Path, **engine: object) -> PortableEngine:
    settings = {"kv_tokens": 4096, "max_batch_size": 32} | engine
    found = build(ReplicaSpec(name="r", model="m", artifact=str(folder), engine=PortableSpec(**settings)), None)  # type: ignore[arg-type]
    assert isinstance(found, PortableEngine)
    return found


def mixed(count: int, **params: object) -> list[Submit]:
    settings = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "logprobs": 2} | params
    prompts = [[(7 * i + 3 * j) % 300 for j in range(3 + 11 * i)] for i in range(count)]
    return [request(p, SamplingParams(seed=i, **settings), id=i) for i, p in enumerate(prompts)]  # type: ignore[arg-type]


def test_batch_mates_chunks_and_preemption_are_invisible(folder: Path) -> None:
    requests = mixed(12, max_tokens=60)
    roomy = engine_of(folder)
    alone = [serve(roomy, [r])[0] for r in requests]
    together = serve(engine_of(folder), requests)
    tight = engine_of(folder, max_num_tokens=40, kv_tokens=512, block_size=8)
    squeezed = serve(tight, requests)
    assert tight.stats().preemptions_total > 0
    found_again = serve(roomy, requests)
    assert roomy.stats().prefix_hits_total > 0
    for others in (together, squeezed, found_again):
        assert not any(margin_violations(a, b, 1e-3) for a, b in zip(alone, others, strict=True))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_fixed_shapes_replay_to_the_bit(folder: Path, temperature: float) -> None:
    requests = mixed(10, temperature=temperature, top_p=0.95, prompt_logprobs=1)
    first = engine_of(folder, fixed_shape=True)
    assert first.resume == "bitwise"
    together = serve(first, requests)
    other = engine_of(folder, fixed_shape=True, max_num_tokens=32, prefix_cache=False)
    for submit, whole in zip(requests, together, strict=True):
        assert serve(other, [submit])[0] == whole  # tokens and every log-probability
        cut = request(submit.prompt_ids, submit.task.params, emitted=whole.tokens[:5])
        rest = serve(other, [cut])[0]
        assert rest.tokens == whole.tokens[5:] and rest.logprobs == whole.logprobs[5:]


def test_a_sampled_stream_continues_where_it_was_cut(folder: Path) -> None:
    engine = engine_of(folder)
    for submit in mixed(6, temperature=0.8, top_k=50):
        whole = serve(engine, [submit])[0]
        rest = serve(engine, [request(submit.prompt_ids, submit.task.params, emitted=whole.tokens[:7])])[0]
        assert rest.tokens == whole.tokens[7:]


def test_log_probabilities_of_prompt_and_output(folder: Path) -> None:
    submit = mixed(4, prompt_logprobs=1)[3]
    engine = engine_of(folder, max_num_tokens=32)
    stream = serve(engine, [submit])[0]
    assert stream.prompt_logprobs is not None and len(stream.prompt_logprobs) == len(submit.prompt_ids)
    assert [entry.token for entry in stream.prompt_logprobs] == submit.prompt_ids and stream.prompt_logprobs[0].logprob is None
    assert [entry.token for entry in stream.logprobs] == stream.tokens
    # Prompt plus output as a prompt must score the output as it was scored when it was made.
    again = serve(engine, [request(submit.prompt_ids + stream.tokens, submit.task.params)])[0]
    assert again.prompt_logprobs is not None
    scores = [entry.logprob for entry in again.prompt_logprobs[len(submit.prompt_ids) :]]
    np.testing.assert_allclose(scores, [entry.logprob for entry in stream.logprobs], atol=1e-4)  # type: ignore[arg-type]


def test_a_grammar_is_followed_to_its_end(folder: Path) -> None:
    engine = engine_of(folder)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=30, guide=GuideSpec(kind="choice", text='["red","green"]'))
    found = serve(engine, [request([5, 6], params), *mixed(3)])[0]
    assert bytes(found.tokens) in (b"red", b"green")
    assert isinstance(found.end, Finish) and found.end.reason == "stop"
    with pytest.raises(Rejected):
        engine.submit(9, request([1], SamplingParams(guide=GuideSpec(kind="regex", text="("))))
    assert not engine.busy()


def test_stop_ids_wait_for_min_tokens(folder: Path) -> None:
    engine = engine_of(folder)
    bias = {IM_END: 100.0}
    stream = serve(engine, [request([1, 2, 3], SamplingParams(temperature=0.0, logit_bias=bias, min_tokens=4, max_tokens=9))])[0]
    assert len(stream.tokens) == 4 and IM_END not in stream.tokens
    assert isinstance(stream.end, Finish) and stream.end.reason == "stop" and stream.end.stop_id == IM_END


def test_cancel_and_close_leave_nothing(folder: Path) -> None:
    engine = engine_of(folder)
    for i, submit in enumerate(mixed(5)):
        engine.submit(i, submit)
    engine.step()
    assert engine.predicted_ms() > 0
    for i in range(5):
        engine.cancel(i)
    while engine.busy():
        assert engine.step() == []
    stats = engine.stats()
    assert stats.free_blocks == engine.capacity.num_blocks and stats.running == stats.waiting == 0
    engine.close()
    engine.close()


def test_what_cannot_be_built_is_said_clearly(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="needs 2 ranks"):
        build(ReplicaSpec(name="r", model="m", artifact=str(folder), parallel=Parallel(tp=2)), None)
    with pytest.raises(ArtifactError, match="no model at"):
        engine_of(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="fp16"):
        engine_of(folder, dtype="fp16")
    with pytest.raises(ConfigError, match="kv_bytes: 10 cannot hold one request"):
        engine_of(folder, kv_tokens=0, kv_bytes=10)
    with pytest.raises(ConfigError, match="more than the model's context"):
        engine_of(folder, max_seq_len=100_000)
    with pytest.raises(ConfigError, match=r"KV cache of .* GB does not fit"):
        engine_of(folder, kv_tokens=1 << 40)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: tests/gpu asks what it refuses")
def test_a_gpu_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="needs a GPU for each of the 1 ranks"):
        engine_of(folder, device="cuda")


def test_random_weights_need_no_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ArtifactError):
        engine_of(tmp_path)
    for quant in (None, "int8"):
        engine = engine_of(tmp_path, options=PortableOptions(load_format="dummy", quant=quant))
        (stream,) = serve(engine, mixed(1))
        assert len(stream.tokens) == 12 and all(entry.logprob is not None and entry.logprob > -100 for entry in stream.logprobs)


def test_pace_follows_what_it_saw() -> None:
    pace = StepTimeModel()
    assert pace.predict(10, 10) == 0
    for i in range(200):
        tokens, sequences = 1 + (i * 37) % 200, 1 + i % 16
        pace.observe(tokens, sequences, 5 + 0.25 * tokens + 0.5 * sequences)
    assert abs(pace.predict(100, 8) - (5 + 25 + 4)) < 0.5
