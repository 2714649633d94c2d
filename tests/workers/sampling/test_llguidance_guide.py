"""Grammars over a real tokenizer file: what is allowed, what is refused, and going back."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny_models import IM_END, tiny_tokenizer
from workers.protocol.errors import ArtifactError, EngineFault, Rejected
from workers.protocol.messages import GuideSpec
from workers.sampling.definition import allowed_ids
from workers.sampling.guide import Guide, GuideFactory
from workers.sampling.llguidance_guide import MAX_CHOICES, MAX_TEXT, guide_factory

VOCAB = 320  # more than the tokenizer's 259


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> GuideFactory:
    return guide_factory(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")) / "tokenizer.json", VOCAB, (IM_END,))


def allowed(guide: Guide) -> list[int]:
    mask = guide.mask()
    assert len(mask) == 4 * -(-VOCAB // 32)
    return np.flatnonzero(allowed_ids(mask, VOCAB)).tolist()


def write(guide: Guide, seed: int) -> bytes:
    """A random output that follows the masks; every byte is its own token."""
    chooser, out = random.Random(seed), b""
    while not guide.done() and len(out) < 400:
        options = allowed(guide)
        # Structure first, so that open-ended strings come to an end.
        token = next((t for t in (ord('"'), ord("}"), IM_END) if t in options and chooser.random() < 0.5), None) or chooser.choice(options)
        guide.advance([token])
        if token == IM_END:
            break
        out += bytes([token])
    return out


def test_a_schema_is_followed(factory: GuideFactory) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}}, "required": ["n", "ok"]}
    schema["additionalProperties"] = False
    for seed in range(4):
        found = json.loads(write(factory(GuideSpec(kind="json_schema", text=json.dumps(schema))), seed))
        assert isinstance(found["n"], int) and isinstance(found["ok"], bool)


def test_every_kind_compiles_and_restrains(factory: GuideFactory) -> None:
    assert allowed(factory(GuideSpec(kind="choice", text='["yes","no"]'))) == sorted(b"yn")
    assert allowed(factory(GuideSpec(kind="regex", text="[a-c]{2}"))) == sorted(b"abc")
    assert allowed(factory(GuideSpec(kind="grammar", text='start: "x" | "y"'))) == sorted(b"xy")
    assert ord("{") in allowed(factory(GuideSpec(kind="json"))) and ord("[") not in allowed(factory(GuideSpec(kind="json")))


def test_done_and_advance(factory: GuideFactory) -> None:
    guide = factory(GuideSpec(kind="choice", text='["no","not \\"x\\""]'))
    guide.advance(list(b"no"))
    assert not guide.done() and IM_END in allowed(guide) and ord("t") in allowed(guide)
    guide.advance(list(b't "x"'))
    assert guide.done()
    with pytest.raises(EngineFault, match="does not allow"):
        guide.advance(list(b"z"))


@pytest.mark.parametrize(
    "spec",
    [
        GuideSpec(kind="json_schema", text="{"),
        GuideSpec(kind="json_schema", text='{"type": "nothing"}'),
        GuideSpec(kind="regex", text="("),
        GuideSpec(kind="grammar", text="start: missing"),
        GuideSpec(kind="choice", text='"yes"'),
        GuideSpec(kind="choice", text="[]"),
        GuideSpec(kind="choice", text=json.dumps(["x"] * (MAX_CHOICES + 1))),
        GuideSpec(kind="regex", text="a" * (MAX_TEXT + 1)),
    ],
)
def test_what_means_nothing_is_the_callers_fault(factory: GuideFactory, spec: GuideSpec) -> None:
    with pytest.raises(Rejected) as caught:
        factory(spec)
    assert caught.value.code == "invalid_schema" and caught.value.why


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        guide_factory(tmp_path / "tokenizer.json", VOCAB, ())
