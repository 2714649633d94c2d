"""Hub ids, and which files of a repository are needed: lists of files as they stand on the hub."""

from __future__ import annotations

import pytest

from orchestrator.hub.reference import HubReference, at_revision, needed_files, parse
from workers.protocol.errors import ArtifactError, Rejected

REPO = HubReference(repo="org/name")
FACTS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Qwen/Qwen3-8B", ("Qwen/Qwen3-8B", "", "")),
        ("01-ai/Yi-1.5_9B@refs/pr/7", ("01-ai/Yi-1.5_9B", "", "refs/pr/7")),
        ("org/name:Q4_K_M", ("org/name", "Q4_K_M", "")),
        ("org/name:sub/file.gguf@v1.0", ("org/name", "sub/file.gguf", "v1.0")),
    ],
)
def test_hub_ids_are_read_and_written(text: str, parts: tuple[str, str, str]) -> None:
    reference = parse(text)
    assert reference is not None and (reference.repo, reference.file, reference.revision) == parts
    assert str(reference) == text


@pytest.mark.parametrize(
    "text", ["gpt2", "./org/name", "/org/name", "~/name", "a/b/c", "../name", "org/", "org/name@", "org/name:", "a b/c", "a/b.gguf"]
)
def test_other_forms_are_no_hub_ids(text: str) -> None:
    assert parse(text) is None


def test_a_revision_is_named_once() -> None:
    assert at_revision("org/name:Q8_0", "v1") == "org/name:Q8_0@v1"
    assert at_revision("/models/here", "") == "/models/here"
    assert at_revision("org/name@v1", "v1") == "org/name@v1"
    for model in ("org/name@v2", "/models/here", "smollm2-135m-instruct"):
        with pytest.raises(Rejected, match="revision"):
            at_revision(model, "v1")


@pytest.mark.parametrize(
    ("files", "needed"),
    [
        # Meta's Llama repositories: the same weights again as pickles below.
        ([*FACTS, *SHARDS, "model.safetensors.index.json", "original/consolidated.00.pth", "original/params.json", "README.md"],
         [*FACTS, "model.safetensors.index.json", *SHARDS]),
        # Mistral's: the same weights again in one file.
        ([*FACTS, *SHARDS, "model.safetensors.index.json", "consolidated.safetensors", "params.json", "tokenizer.model.v3"],
         [*FACTS, "model.safetensors.index.json", *SHARDS]),
        # Old ones: every framework's format, and ONNX.
        ([*FACTS, "model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack",
          "onnx/model.onnx", "onnx/config.json", "vocab.json", "merges.txt"],
         [*FACTS, "vocab.json", "merges.txt", "model.safetensors"]),
        # Templates in files of their own, a GGUF beside, code that is never run.
        ([*FACTS, "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "model.safetensors", "name-q4_0.gguf", "modeling_x.py",
          "tokenizer.model"],
         [*FACTS, "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer.model", "model.safetensors"]),
        # Shards of an older upload beside the single file.
        ([*FACTS, "model.safetensors", *SHARDS], [*FACTS, "model.safetensors"]),
        # A TensorRT-LLM checkpoint.
        (["config.json", "manifest.json", "rank0.safetensors", "rank1.safetensors"],
         ["config.json", "manifest.json", "rank0.safetensors", "rank1.safetensors"]),
    ],
)  # fmt: skip
def test_only_what_a_replica_loads_is_needed(files: list[str], needed: list[str]) -> None:
    found = needed_files(REPO, files)
    assert (sorted(found.names), found.model) == (sorted(needed), "")
    assert sorted(needed_files(REPO, files, weights=False).names) == sorted(n for n in needed if not n.endswith(".safetensors"))


QUANTS = [
    "README.md", "config.json", "mmproj-F16.gguf", "name-Q4_K_M.gguf", "name-Q4_K_S.gguf", "name-UD-Q4_K_XL.gguf",
    "BF16/name-BF16-00001-of-00002.gguf", "BF16/name-BF16-00002-of-00002.gguf", "imatrix.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("Q4_K_M", ["name-Q4_K_M.gguf"]),
        ("q4_k_s", ["name-Q4_K_S.gguf"]),
        ("UD-Q4_K_XL", ["name-UD-Q4_K_XL.gguf"]),
        ("name-Q4_K_M.gguf", ["name-Q4_K_M.gguf"]),
        ("bf16", ["BF16/name-BF16-00001-of-00002.gguf", "BF16/name-BF16-00002-of-00002.gguf"]),
        ("BF16/name-BF16-00001-of-00002.gguf", ["BF16/name-BF16-00001-of-00002.gguf", "BF16/name-BF16-00002-of-00002.gguf"]),
    ],
)
def test_a_gguf_is_named_by_its_quantization_or_file(said: str, names: list[str]) -> None:
    reference = HubReference(repo="org/name", file=said)
    assert needed_files(reference, QUANTS) == (names, names[0])


def test_the_only_gguf_needs_no_name() -> None:
    assert needed_files(REPO, ["README.md", "mmproj-F16.gguf", "sub/x.Q8_0.gguf"]) == (["sub/x.Q8_0.gguf"], "sub/x.Q8_0.gguf")


@pytest.mark.parametrize(
    ("reference", "files", "says"),
    [
        (REPO, QUANTS, "several GGUF files.*name-Q4_K_M.gguf"),
        (HubReference(repo="org/name", file="Q5_0"), QUANTS, "no GGUF file Q5_0.*name-Q4_K_M.gguf"),
        (HubReference(repo="org/name", file="Q5_0"), [*FACTS, "model.safetensors"], "no GGUF file Q5_0: it has no GGUF"),
        (REPO, [*FACTS, "pytorch_model.bin"], "no safetensors.*pickled .pytorch_model.bin"),
        (REPO, ["model_index.json", "unet/model.safetensors"], "no config.json"),
        (REPO, FACTS, "no weights"),
    ],
)
def test_what_cannot_be_served_is_refused_before_it_is_fetched(reference: HubReference, files: list[str], says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        needed_files(reference, files)
