"""What an update may change in place, and what it refuses by name. Its moves are tested in test_rollout, the whole in tests/e2e."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.deployment_file import Resolved, load
from orchestrator.control.host.control_socket import UpdateCommand
from orchestrator.control.host.update import merge, prepare
from tests.support.hardware import NO_GPU
from tests.support.tiny_models import tiny_tokenizer
from workers.artifacts.convert import silent
from workers.protocol.errors import ConfigError

TREE: dict[str, Any] = {"name": "d", "http": {"port": 8123}, "models": [{"name": "m", "engine": "fake", "aliases": ["old"]}]}


def resolved(**more: Any) -> Resolved:
    return load(TREE | more)


def order(wanted: Resolved) -> UpdateCommand:
    return UpdateCommand(config=wanted.config, said=tuple(wanted.sources))


def model(**more: Any) -> dict[str, Any]:
    return TREE["models"][0] | more


def test_models_change_and_the_rest_stays() -> None:
    current = load(TREE, flags={"port": 9000, "routers": 2}).config
    wanted = load({"name": "d", "models": [model(replicas=3, dtype="bf16")]})
    merged = merge(current, order(wanted))
    assert (merged.http.port, merged.routers) == (9000, 2), "what the file does not say is not wanted otherwise"
    assert merged.models == wanted.config.models


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"http": {"port": 8124}}, "http.port (8123 runs, 8124 is wanted)"),
        ({"routers": 2}, "routers (1 runs, 2 is wanted)"),
        ({"admission": {"max_queue": 7}}, "admission.max_queue (512 runs, 7 is wanted)"),
        ({"launcher": "local"}, "launcher (auto runs, local is wanted)"),
        ({"models": [model(aliases=["new"])]}, "aliases of m (('old',) runs, ('new',) is wanted)"),
        ({"models": [model(chat_template="b.jinja")]}, "chat_template of m (its own runs, b.jinja is wanted)"),
        ({"models": [model(max_seq_len=64)]}, "max_seq_len of m (0 runs, 64 is wanted)"),
        ({"models": [model(), {"name": "n", "engine": "fake"}]}, "models (m run, m, n are wanted)"),
    ],
)
def test_what_routers_hold_is_refused_by_name(more: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        merge(resolved().config, order(resolved(**more)))
    assert refused.value.what == f"this cannot be changed in place: {named}"


def test_everything_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"http\.port .*, routers .*, aliases of m"):
        merge(resolved().config, order(resolved(http={"port": 1}, routers=2, models=[model(aliases=[])])))


def test_paths_mean_the_same_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tokenizer(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    rows = [{"name": "a"}, {"name": "b", "path": "tokenizer"}]
    relative = resolved(run_dir="run", models=[model(path="tokenizer", replicas=rows)]).config
    rooted = prepare(relative, NO_GPU, silent)
    assert rooted.run_dir == str(tmp_path / "run")
    assert {member.path for member in rooted.models[0].gangs()} == {str(tmp_path / "tokenizer")}
