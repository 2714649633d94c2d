"""What a checked body becomes with a model: prompts that are cut, words that are forbidden, defaults of the model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from orchestrator.auth.api_keys import Salting
from orchestrator.config.router_spec import AdmissionSpec, ModelCard
from orchestrator.router import request_context
from orchestrator.router.frontend.preprocess import CallerContext, Preprocessor
from orchestrator.router.frontend.sampling_defaults import SamplingDefaults, read_defaults
from orchestrator.router.frontend.schema import read
from orchestrator.router.frontend.text_models import TextModels, load_texts
from tests.support.scripted_router import CONTEXT, ScriptedDispatcher
from workers.protocol.errors import ArtifactError
from workers.protocol.messages import SamplingParams

CALLER = CallerContext(client="test", request_id="r")
#: Texts of which some are one token at the start of a text and another one after a blank, some several tokens, some never one.
PIECES = ["n", "o", "no", "Ġ", "Ġno", "w", "now", "Ġnow", "t", "h", "e", "th", "the", "Ġthe", "y", "a", "Ċ"]
MERGES = [("n", "o"), ("Ġ", "no"), ("no", "w"), ("Ġno", "w"), ("t", "h"), ("th", "e"), ("Ġ", "the")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with merges that puts ``<s>`` before a prompt."""
    folder = tmp_path_factory.mktemp("bpe")
    vocabulary = {"<s>": 0, **{piece: id for id, piece in enumerate(PIECES, 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}<s>{{ message.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def oracle(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", truncation_side="left")


class Prepared:
    """Prepares requests of one model, on one event loop (the processes that render belong to it)."""

    def __init__(self, card: ModelCard) -> None:
        self.texts: TextModels = load_texts([card])
        self.loop = asyncio.Runner()
        self.preprocessor = Preprocessor(self.texts, ScriptedDispatcher(), AdmissionSpec(), Salting(b"salt"))

    def __call__(self, endpoint: Any = "completions", **fields: Any) -> Any:
        """The one request that a body becomes."""
        prompt = {"messages": [{"role": "user", "content": "no"}]} if endpoint == "chat" else {"prompt": "no"}
        body = read(endpoint, {"model": "bpe", **prompt, **fields})
        return self.loop.run(self.preprocessor.prepare(body, CALLER)).requests[0]

    def close(self) -> None:
        self.texts.close()
        self.loop.close()


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Iterator[Prepared]:
    prepared = Prepared(ModelCard(name="bpe", tokenizer=str(folder)))
    yield prepared
    prepared.close()


TEXT = "the now no the way the now no"


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("keep", [1, 2, 3, 5, 8, 40])
def test_a_prompt_is_cut_as_transformers_cuts_it(prepared: Prepared, oracle: PreTrainedTokenizerFast, keep: int, special: bool) -> None:
    """vLLM truncates by its tokenizer, from the left: what the tokenizer adds before a prompt stays, and counts."""
    found = prepared(prompt=TEXT, truncate_prompt_tokens=keep, add_special_tokens=special).prompt_ids
    assert found == oracle(TEXT, add_special_tokens=special, truncation=True, max_length=keep)["input_ids"]


def test_ids_and_chats_are_cut_to_their_last_tokens(prepared: Prepared) -> None:
    assert prepared(prompt=[1, 2, 3, 4], truncate_prompt_tokens=2).prompt_ids == [3, 4]
    whole = prepared("chat", messages=[{"role": "user", "content": TEXT}]).prompt_ids
    assert prepared("chat", messages=[{"role": "user", "content": TEXT}], truncate_prompt_tokens=3).prompt_ids == whole[-3:]


def test_a_prompt_is_cut_to_what_leaves_room_for_the_answer(prepared: Prepared) -> None:
    """-1; also where the text is far too long for the context."""
    for fields, room in (({"max_tokens": 100}, 100), ({}, 1)):
        request = prepared(prompt=TEXT * 500, truncate_prompt_tokens=-1, **fields)
        assert (len(request.prompt_ids), request.params.max_tokens) == (CONTEXT - room, room)


def test_an_echo_is_what_is_left_of_the_prompt(prepared: Prepared) -> None:
    body = read("completions", {"model": "bpe", "prompt": TEXT, "echo": True, "truncate_prompt_tokens": 3})
    assert prepared.loop.run(prepared.preprocessor.prepare(body, CALLER)).echoes == (" now no",)


def test_a_request_is_its_callers(prepared: Prepared) -> None:
    body = read("completions", {"model": "bpe", "prompt": TEXT})

    async def prepare() -> str:
        request_context.enter("q", "", "192.0.2.7")
        return (await prepared.preprocessor.prepare(body, CALLER)).requests[0].tenant

    assert prepared.loop.run(prepare()) == "192.0.2.7"


def vllm_bad_words(tokenizer: PreTrainedTokenizerFast, words: list[str]) -> list[list[int]]:
    """vLLM's ``SamplingParams.update_from_tokenizer``."""
    found: list[list[int]] = []
    for word in words:
        for add_prefix_space in (False, True):
            ids = tokenizer.encode((" " if add_prefix_space else "") + word.lstrip(), add_special_tokens=False)
            if not add_prefix_space or (ids[0] != found[-1][0] and len(ids) == len(found[-1])):
                found.append(ids)
    return found


@pytest.mark.parametrize("words", [["no"], ["now"], [" the"], ["the way", "no"], ["y"], ["t h", "nowno", "the\n"]])
def test_bad_words_are_those_ids_that_vllm_forbids(prepared: Prepared, oracle: PreTrainedTokenizerFast, words: list[str]) -> None:
    assert [list(ids) for ids in prepared(bad_words=words).params.bad_words] == vllm_bad_words(oracle, words)


# --- defaults of the model

GENERATION = {
    "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.05, "max_new_tokens": 7, "do_sample": True,
    "pad_token_id": 0, "eos_token_id": [3, 4], "length_penalty": float("nan"), "transformers_version": "5.0",
}  # fmt: skip


def sampling(params: SamplingParams) -> tuple[float, ...]:
    return (params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty)


@pytest.fixture
def with_defaults(folder: Path, tmp_path: Path) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION))
    return tmp_path


def test_what_a_request_does_not_say_its_model_says(with_defaults: Path) -> None:
    prepared = Prepared(ModelCard(name="bpe", tokenizer=str(with_defaults)))
    chat, completion = prepared("chat").params, prepared().params
    assert sampling(chat) == sampling(completion) == (0.6, 20, 0.95, 0.05, 1.05)
    assert chat.stop_ids == (3, 4) and (chat.max_tokens, completion.max_tokens) == (7, 16)
    asked = {"temperature": 0, "top_k": -1, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "max_tokens": 30}
    own = prepared("chat", **asked).params
    assert sampling(own) == (0.0, 0, 1.0, 0.0, 1.0) and own.max_tokens == 30, "a value of the request wins"
    shown = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.05, "max_tokens": 7}
    assert prepared.preprocessor.defaults() == {"bpe": shown}
    prepared.close()


def test_generation_config_none(with_defaults: Path) -> None:
    prepared = Prepared(ModelCard(name="bpe", tokenizer=str(with_defaults), generation_config="none"))
    params = prepared("chat").params
    assert sampling(params) == (1.0, 0, 1.0, 0.0, 1.0) and params.max_tokens > 7
    assert params.stop_ids == (3, 4), "the end of an answer is no default"
    assert prepared.preprocessor.defaults() == {"bpe": {}}
    prepared.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.5), ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", "0.7"),
        ("top_p", 0), ("top_p", 1.5), ("top_k", -2), ("top_k", 0.5), ("top_k", True), ("min_p", 2), ("repetition_penalty", 0),
        ("max_new_tokens", 0), ("max_new_tokens", -5), ("max_new_tokens", [20]),
    ],
)  # fmt: skip
def test_a_default_that_no_request_could_have_is_an_error_at_the_start(key: str, value: object) -> None:
    with pytest.raises(ArtifactError, match=f"generation_config.json: {key} must be") as caught:
        read_defaults({key: value}, "/models/m")
    assert "--generation-config none" in caught.value.hint and str(value)[:20] in caught.value.why


def test_null_and_absent_keys_are_no_defaults() -> None:
    assert read_defaults({"temperature": None, "top_k": None, "num_beams": 4}, "m") == SamplingDefaults()
