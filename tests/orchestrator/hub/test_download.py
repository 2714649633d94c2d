"""Downloads from a real HTTP server that speaks the hub's API: what comes, what is checked, what is refused and in which words."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.cli.plan import subjects
from orchestrator.config.deployment_file import load
from orchestrator.hub.fetch import FetchOrder, fetch
from orchestrator.hub.reference import HubReference
from orchestrator.model_store import locate, resolve
from orchestrator.planner.automatic import ClusterHardware, NodeHardware
from tests.support.hub_server import COMMIT, Hub, HubRepo, running_hub
from tests.support.tiny_models import tiny_gguf, tiny_model
from workers.artifacts.artifact import open_artifact
from workers.artifacts.convert import silent
from workers.protocol.errors import ArtifactError, EnvironmentFault, NotFound, TriremeError, Unauthorized
from workers.protocol.specs import Parallel

pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")

from orchestrator.hub.download import THREADS

ID = "org/tiny"
ORDER = FetchOrder(reference=HubReference(repo=ID))
WEIGHTS = "model.safetensors"
#: The client writes so many bytes at a time.
CHUNK = 1 << 18


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tiny_model(tmp_path_factory.mktemp("hub") / "tiny")
    gguf = tiny_gguf(folder, folder.parent / "tiny.gguf").read_bytes()
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"tiny-F32.gguf": gguf}
    return files | {"pytorch_model.bin": b"a pickle", "onnx/model.onnx": b"the same again", "README.md": b"# tiny"}


@pytest.fixture
def hub(model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model, in an environment that knows no other; both ways to the hub's client see it."""
    from huggingface_hub import constants

    with running_hub() as hub:
        hub.repos[ID] = HubRepo(files=dict(model))
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        # The client reads the environment once, when it is imported.
        urls = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        caches = {"HF_HUB_CACHE": str(tmp_path / "hf" / "hub"), "HF_TOKEN_PATH": str(tmp_path / "none")}
        for name, value in ({"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": urls} | caches).items():
            monkeypatch.setattr(constants, name, value)
        yield hub


def fetched(order: FetchOrder = ORDER) -> Path:
    """What the download process does, in this process: a start of it costs a second."""
    from orchestrator.hub.download import download

    return download(order, silent)


def refused(kind: type[TriremeError], order: FetchOrder = ORDER) -> str:
    """The three lines of the error in which the download ends."""
    with pytest.raises(kind) as caught:
        fetched(order)
    for thread in threading.enumerate():
        if thread.name.startswith(THREADS):
            thread.join(30)  # in the product their process has ended
    error = caught.value
    assert all(text and "\n" not in text for text in (error.what, error.why, error.hint)), error.lines()
    return error.lines()


def large(hub: Hub) -> bytes:
    """Weights of several chunks, which nobody loads."""
    hub.repos[ID].files[WEIGHTS] = data = bytes(range(256)) * (5 * CHUNK // 256)
    return data


def partials(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "hf").rglob("*.partial"))


def test_a_model_comes_with_what_it_needs_and_only_once(hub: Hub, model: dict[str, bytes], tmp_path: Path) -> None:
    folder = fetched()
    assert folder == tmp_path / "hf" / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert kept == {name: model[name] for name in kept} and {WEIGHTS, "config.json", "tokenizer.json"} <= set(kept)
    assert not set(kept) & {"pytorch_model.bin", "README.md", "onnx", "tiny-F32.gguf"}
    assert open_artifact(folder).tokenizer_dir == folder
    hub.requests.clear()
    assert fetched() == folder and not hub.downloads() and len(hub.requests) == 1


def test_the_cache_is_the_one_of_the_hubs_own_client(hub: Hub) -> None:
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    folder = fetched()
    assert try_to_load_from_cache(ID, WEIGHTS) == str(folder / WEIGHTS)
    (repo,) = scan_cache_dir().repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash, revision.refs) == (ID, COMMIT, frozenset({"main"}))


def test_a_gguf_comes_alone(hub: Hub, model: dict[str, bytes]) -> None:
    path = fetched(FetchOrder(reference=HubReference(repo=ID, file="F32")))
    assert path.name == "tiny-F32.gguf" and path.read_bytes() == model[path.name]
    assert [each.path.rpartition("/")[2] for each in hub.downloads()] == ["tiny-F32.gguf"]


def test_routers_need_no_weights(hub: Hub) -> None:
    folder = fetched(FetchOrder(reference=HubReference(repo=ID), weights=False))
    assert (folder / "tokenizer.json").exists() and not (folder / WEIGHTS).exists()
    assert (fetched() / WEIGHTS).exists()


def test_a_revision_is_another_commit(hub: Hub, model: dict[str, bytes]) -> None:
    hub.repos[ID].revisions |= {"refs/pr/1": "b" * 40}
    order = FetchOrder(reference=HubReference(repo=ID, revision="refs/pr/1"))
    assert fetched(order).name == "b" * 40
    by_commit = FetchOrder(reference=HubReference(repo=ID, revision="b" * 40))
    assert fetched(by_commit) == fetched(order) != fetched()
    lines = refused(NotFound, FetchOrder(reference=HubReference(repo=ID, revision="v9")))
    assert "org/tiny has no revision v9" in lines


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_wrong_hash_keeps_nothing(name: str, hub: Hub, tmp_path: Path) -> None:
    hub.repos[ID].wrong = (name,)
    lines = refused(ArtifactError)
    assert f"{name} is not what it should be" in lines and "expected" in lines
    hub.repos[ID].wrong = ()
    assert fetched().joinpath(name).read_bytes() == hub.repos[ID].files[name] and not partials(tmp_path)


def test_files_of_equal_content_are_fetched_once(hub: Hub, tmp_path: Path) -> None:
    hub.repos[ID].files |= dict.fromkeys(("added_tokens.json", "special_tokens_map.json"), b'{"a": 1}')
    folder = fetched()
    assert folder.joinpath("added_tokens.json").read_bytes() == folder.joinpath("special_tokens_map.json").read_bytes() == b'{"a": 1}'
    assert sum(each.path.endswith(("added_tokens.json", "special_tokens_map.json")) for each in hub.downloads()) == 1 and not partials(
        tmp_path
    )


def test_pull_finds_a_damaged_cache(hub: Hub) -> None:
    order = FetchOrder(reference=HubReference(repo=ID), verify=True)
    path = fetched(order) / WEIGHTS
    blob = path.resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "expected sha256" in refused(ArtifactError, order)
    assert fetched(order).joinpath(WEIGHTS).read_bytes() == hub.repos[ID].files[WEIGHTS]


def test_a_lost_connection_is_taken_up_where_it_ended(hub: Hub) -> None:
    data = large(hub)
    hub.cut_after = 3 * CHUNK + 1
    assert fetched().joinpath(WEIGHTS).read_bytes() == data
    assert [each.range for each in hub.downloads() if WEIGHTS in each.path] == ["", f"bytes={3 * CHUNK}-"]


def test_a_partial_file_longer_than_the_file_begins_anew(hub: Hub, model: dict[str, bytes]) -> None:
    folder = fetched()
    blob = (folder / WEIGHTS).resolve()
    blob.rename(blob.with_name(f"{blob.name}.partial"))
    with blob.with_name(f"{blob.name}.partial").open("ab") as partial:
        partial.write(b"more")
    assert fetched().joinpath(WEIGHTS).read_bytes() == model[WEIGHTS]


def test_gated_and_private_models_are_explained_and_given_to_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[ID].gated, hub.repos[ID].tokens = True, ("hf_right",)
    lines = refused(Unauthorized)
    assert "org/tiny is gated" in lines and "no token is set" in lines and f"{hub.url}/org/tiny" in lines and "HF_TOKEN" in lines
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "has not been given access" in refused(Unauthorized)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert fetched().joinpath(WEIGHTS).exists()
    # The store behind the hub is another host: it never gets the token.
    assert not any(each.authorization for each in hub.requests if each.path.startswith("/cdn/"))
    hub.repos["org/secret"] = HubRepo(files=hub.repos[ID].files, private=True)
    for repo in ("org/secret", "org/none"):
        lines = refused(NotFound, FetchOrder(reference=HubReference(repo=repo)))
        assert f"there is no model at {repo}" in lines and "no file or folder is there" in lines


def test_without_a_hub_a_whole_model_in_the_cache_will_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(EnvironmentFault)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = fetched()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert fetched() == folder and not hub.requests
    (folder / WEIGHTS).unlink()
    assert "does not hold it whole" in refused(EnvironmentFault)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert fetched() == folder
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert fetched() == folder
    assert "check the network" in refused(EnvironmentFault, FetchOrder(reference=HubReference(repo="org/other")))


def test_names_that_leave_the_folder_are_never_fetched(hub: Hub, model: dict[str, bytes]) -> None:
    hub.repos["org/evil"] = HubRepo(files={"../../x.gguf": model["tiny-F32.gguf"]})
    assert "cannot be downloaded" in refused(EnvironmentFault, FetchOrder(reference=HubReference(repo="org/evil")))


def test_an_ended_download_goes_on_from_its_last_byte(hub: Hub, tmp_path: Path) -> None:
    """By its process: what `trireme pull` and the host of a deployment do, and what Ctrl-C does to it."""
    data = large(hub)
    hub.hold_after = held = 2 * CHUNK
    partial = tmp_path / "hf" / "hub" / "models--org--tiny" / "blobs" / f"{hashlib.sha256(data).hexdigest()}.partial"
    seen = []

    def interrupt(phase: str, done: int, total: int) -> None:
        seen.append((phase, done, total))
        if partial.exists() and partial.stat().st_size == held:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(ORDER, interrupt)
    assert held <= seen[-1][1] < seen[-1][2] and seen[-1][0] == "download"
    hub.hold_after = None
    hub.released.set()
    hub.requests.clear()
    path = locate(ID, tmp_path / "cache")
    assert [each.range for each in hub.downloads() if WEIGHTS in each.path] == [f"bytes={held}-"]
    assert (path / WEIGHTS).read_bytes() == data


def test_errors_of_the_process_are_the_same_errors(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no model at org/none") as caught:
        resolve("org/none@v1", parallel=Parallel(), dtype=None, cache=tmp_path)
    assert "HF_TOKEN" in caught.value.hint


def test_a_plan_needs_no_weights(hub: Hub) -> None:
    cpus = ClusterHardware(nodes=(NodeHardware(),))
    (subject,) = subjects(load({"models": [{"name": ID, "replicas": 1}]}, flags={}, env={}).config, cpus)
    assert subject.model.hidden_size == 48 and not [each for each in hub.downloads() if WEIGHTS in each.path]


def test_a_path_that_exists_wins_and_what_is_neither_gets_a_hint(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(ID).mkdir(parents=True)
    assert locate(ID, tmp_path / "cache") == Path(ID) and not hub.requests
    with pytest.raises(ArtifactError, match="no file or folder is there; models known by name are: smollm2") as caught:
        locate("gpt2", tmp_path / "cache")
    assert "a hub id: ORG/NAME" in caught.value.hint


def test_the_extra_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.hub.fetch.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="huggingface_hub is not installed") as caught:
        fetch(ORDER, silent)
    assert "trireme-llm[hub]" in caught.value.hint
