"""`trireme verify`: where two answers part and by how much, judged on values; then on real replicas of both engines."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from orchestrator.cli import verify
from orchestrator.cli.console import Console, ConsoleSettings
from orchestrator.cli.main import run
from orchestrator.cli.verify import Agreement, ask_both, compare, report
from tests.support.trtllm_host import checkpoint_of, engine_of, pretend
from workers.protocol.errors import ArtifactError
from workers.protocol.messages import Logprobs


def scores(*rows: dict[int, float]) -> list[Logprobs]:
    """One row a position: token -> log-probability, the chosen one first."""
    return [Logprobs(next(iter(row)), next(iter(row.values())), list(row), list(row.values())) for row in rows]


def test_equal_answers_agree() -> None:
    found = compare("p", [1, 2], [1, 2], scores({1: -0.1}, {2: -0.1}))
    assert (found.same, found.total, found.parted, found.shown) == (2, 2, False, "-")


def test_the_margin_is_what_the_reference_thought_of_both() -> None:
    found = compare("p", [1, 7, 9], [1, 2, 3], scores({1: -0.1}, {2: -1.0, 7: -1.25}, {3: -0.1}))
    assert (found.same, found.engine_token, found.reference_token, found.margin, found.open) == (1, 7, 2, 0.25, False)
    far = compare("p", [8], [2], scores({2: -0.5, 7: -4.5}))
    assert far.open and far.shown == ">4.000"


def test_an_answer_that_ends_early_parts_there() -> None:
    found = compare("p", [1], [1, 2], scores({1: -0.1}, {2: -0.1}))
    assert (found.same, found.total, found.parted, found.margin) == (1, 2, True, float("inf"))


def judged(*results: Agreement, form: str = "text") -> str:
    stdout = io.StringIO()
    report(Console(ConsoleSettings(), stdout=stdout, stderr=io.StringIO()), list(results), 0.25, form)
    return stdout.getvalue()


def test_rounding_passes_and_a_real_difference_does_not() -> None:
    near = Agreement(prompt="a\nb", same=3, total=8, engine_token=5, reference_token=6, margin=0.2)
    assert "a b" in judged(near) and "5 / 6" in judged(near)
    assert json.loads(judged(near, form="json"))[0]["margin"] == 0.2
    with pytest.raises(ArtifactError) as caught:
        judged(near, Agreement(prompt="other", same=1, total=8, engine_token=5, reference_token=6, margin=2.5))
    assert caught.value.why == "'other' parts at token 1 with a margin of 2.500 nats, above 0.25"


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setenv("TRIREME_FAKE_GPUS", json.dumps([["NVIDIA H100 80GB HBM3", "9.0", 81559, 81000]] * 2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")


@pytest.mark.mpi
def test_replicas_that_say_the_same_agree(tmp_path: Path, two_gpus: None) -> None:
    """The faked TensorRT-LLM on two ranks and FakeEngine speak by one oracle."""
    checkpoint = checkpoint_of(tmp_path, tp=2, pp=1)
    candidate = {"path": str(engine_of(tmp_path, checkpoint).path), "engine": "trtllm", "tp_size": 2, "device": "cuda"}
    reference = {"path": str(checkpoint), "engine": "fake", "max_seq_len": 512, "kv_tokens": 1024}
    found = ask_both(Console(ConsoleSettings(quiet=True)), candidate, reference, ["hello", "once more"], 16, tmp_path / "cache")
    assert [(result.same, result.total) for result in found] == [(16, 16), (16, 16)]


@pytest.mark.mpi
def test_an_engine_that_says_something_else_is_told(
    tmp_path: Path, two_gpus: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The faked TensorRT-LLM answers with a hash of the prompt: served, compared, and found to differ at the first token."""
    monkeypatch.setattr(verify, "PROMPTS", ("hello", "once more"))
    engine = engine_of(tmp_path, checkpoint_of(tmp_path, tp=2, pp=1))
    assert run(["verify", str(engine.path), "--tokens", "8", "--cache-dir", str(tmp_path / "cache"), "--quiet"]) == 3
    told = capsys.readouterr()
    assert "hello" in told.out and "0/8" in told.out
    assert "the engine disagrees with the portable engine on 2 of 2 prompts" in told.err


def test_what_an_engine_was_built_from_must_still_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch)
    checkpoint = checkpoint_of(tmp_path)
    engine = engine_of(tmp_path, checkpoint)
    (tmp_path / "other").mkdir()
    checkpoint_of(tmp_path / "other", seed=3).rename(tmp_path / "new")
    checkpoint.rename(tmp_path / "old")
    assert run(["verify", str(engine.path)]) == 3
    assert "there is no checkpoint at" in capsys.readouterr().err
    (tmp_path / "new").rename(checkpoint)
    assert run(["verify", str(engine.path)]) == 3
    assert "is another checkpoint now" in capsys.readouterr().err
