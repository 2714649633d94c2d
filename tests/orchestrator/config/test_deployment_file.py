"""A deployment file means one thing, says where each value came from, and is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.config.deployment_file import load, settings
from orchestrator.control.host.deployment_plan import ServedModel, model_cards
from tests.support.hardware import EIGHT_LARGE, decided
from workers.protocol.errors import ConfigError
from workers.protocol.specs import CommonEngineSpec, FakeOptions, FakeSpec, Parallel, PortableOptions, PortableSpec, TrtllmSpec
from workers.protocol.trtllm_options import TrtllmOptions

EXAMPLES = Path(__file__).resolve().parents[3] / "deploy" / "examples"
MODEL: dict[str, Any] = {"name": "m"}


def refused(tree: dict[str, Any], **more: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(tree, **more)
    return caught.value


def test_the_examples_say_what_the_demo_needs() -> None:
    config = load(EXAMPLES / "local.yaml").config
    assert (config.launcher, config.http.host, config.http.port) == ("ray", "127.0.0.1", 8000)
    assert config.models[0].name == "smollm2-135m-instruct"
    assert [(gang.name, gang.tp_size, gang.pp_size) for gang in config.models[0].gangs()] == [("tp2", 2, 1), ("pp2", "auto", 2)]
    fake = load(EXAMPLES / "fake.yaml").config
    assert fake.launcher == "local" and isinstance(decided(fake.models[0])[0].engine, FakeSpec)


def test_precedence_and_sources(tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    file.write_text("routers: 2\nhttp: {port: 7000}\nmodels: [{name: m, dtype: bf16, tp_size: 2}]\n")
    env = {"TRIREME_ROUTERS": "3", "TRIREME_HTTP_PORT": "7001", "TRIREME_KV_TOKENS": "512", "TRIREME_URL": "not ours"}
    resolved = load(file, flags={"port": 7002, "dtype": None, "tp_size": 4}, env=env)
    rows = {row.path: (row.value, row.source) for row in resolved.rows()}
    assert rows["http.port"] == (7002, "flag --port")
    assert rows["routers"] == (3, "environment TRIREME_ROUTERS")
    assert rows["models[0].kv_tokens"] == (512, "environment TRIREME_KV_TOKENS")
    assert rows["models[0].tp_size"] == (4, "flag --tp-size")
    assert rows["models[0].dtype"] == ("bf16", f"file {file}")
    assert rows["heartbeat_s"] == (0.2, "default")
    assert [(gang.name, gang.layout) for gang in resolved.config.models[0].gangs()] == [("m-0", Parallel(tp=4))]


def test_unknown_keys_are_refused_with_the_nearest_name() -> None:
    assert "did you mean models?" in refused({"modles": []}).hint
    error = refused({"models": [MODEL | {"max_bath_size": 3}]})
    assert "models[0].max_bath_size" in error.what and error.hint == "did you mean max_batch_size?"
    error = refused({"models": [MODEL | {"replicas": [{"name": "a", "tp-size": 2}]}]})
    assert "models[0].replicas[0].tp-size" in error.what and error.hint == "did you mean tp_size?"
    assert "did you mean max_seq_len" in refused({"models": [MODEL]}, flags={"max_sequ_len": 3}).hint


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"models": [MODEL | {"threads": "two"}]}, "models[0].threads"),
        ({"models": [MODEL | {"max_batch_size": 512, "max_num_tokens": 256}]}, "models[0]: max_num_tokens"),
        ({"models": [MODEL | {"max_num_tokens": "many"}]}, "models[0].max_num_tokens"),
        ({"models": [MODEL | {"gpu_memory_utilization": 90}]}, "models[0].gpu_memory_utilization"),
        ({"models": [MODEL], "http": {"host": "0.0.0.0"}}, "http.host"),
        ({"models": [MODEL], "http": {"port": True}}, "http.port"),
        ({"models": [MODEL], "http": {"port": 0}, "routers": 2}, "http.port"),
        ({"models": []}, "models"),
        ({"models": [MODEL], "name": "../x"}, "name"),
        ({"models": [MODEL | {"replicas": [{"name": "a/b"}]}]}, "models[0].replicas"),
        ({"models": [MODEL | {"replicas": [{"name": "a"}, {"name": "a"}]}]}, "models[0].replicas"),
        ({"models": [MODEL, MODEL]}, "model name m is used twice"),
        ({"models": [MODEL | {"replicas": 0}]}, "models[0].replicas"),
        ({"models": [MODEL | {"tp_size": -1}]}, "models[0]"),
        ({"models": [MODEL], "heartbeat_s": 0}, "heartbeat_s"),
        ({"models": [MODEL], "launcher": "ssh"}, "launcher"),
        ({"models": MODEL}, "models"),
        ({"models": [MODEL], "http": 3}, "http"),
    ],
)
def test_what_cannot_be_is_refused_by_path(tree: dict[str, Any], named: str) -> None:
    error = refused(tree)
    assert named in error.what and error.exit_code == 3


def test_environment_text_must_be_of_the_type() -> None:
    error = refused({"models": [MODEL]}, env={"TRIREME_ROUTERS": "many"})
    assert error.what.startswith("routers") and "TRIREME_ROUTERS" in error.why


def test_files_that_are_no_deployment(tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    with pytest.raises(ConfigError, match="cannot read"):
        load(file)
    for text, said in (("- 1", "no mapping"), ("a: [", "not YAML"), ("name: a\nname: b\nmodels: [{name: m}]", "stands twice")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            load(file)


@pytest.mark.parametrize(("model", "replica"), [("Org/My Model", "org-my-model-0"), ("模型", "model-0"), ("--", "model-0")])
def test_replicas_of_a_model_of_any_name_have_names(model: str, replica: str) -> None:
    [served] = load({"models": [{"name": model}]}).config.models
    assert [gang.name for gang in served.gangs()] == [replica]


def test_every_flag_reaches_a_value() -> None:
    table = settings()
    assert {"tp_size", "pp_size", "dtype", "port", "host", "launcher", "replicas", "run_dir", "cache_dir", "ray_address", "name"} <= set(
        table
    )
    assert table["name"] == "name" and table["tp_size"] == "models[].tp_size"


@pytest.mark.parametrize("text", ["https://a.org,http://localhost:3000", '["https://a.org", "http://localhost:3000"]'])
def test_a_flag_and_a_variable_hold_a_list(text: str) -> None:
    wanted = ("https://a.org", "http://localhost:3000")
    assert load({"models": [MODEL]}, flags={"allowed_origins": text}).config.http.allowed_origins == wanted
    assert load({"models": [MODEL]}, env={"TRIREME_ALLOWED_ORIGINS": text}).config.http.allowed_origins == wanted
    assert load({"models": [MODEL], "http": {"allowed_origins": list(wanted)}}).config.http.allowed_origins == wanted


def test_where_defaults_of_requests_come_from_reaches_the_routers() -> None:
    config = load({"models": [MODEL, {"name": "n", "generation_config": "none"}]}).config
    assert [model.generation_config for model in config.models] == ["auto", "none"]
    served = [ServedModel(config=model, source="s", tokenizer="t", gangs=()) for model in config.models]
    assert [card.generation_config for card in model_cards(served)] == ["auto", "none"]
    every = load({"models": [MODEL, {"name": "n"}]}, flags={"generation_config": "none"}).config
    assert {model.generation_config for model in every.models} == {"none"}
    assert "auto, none" in refused({"models": [{"name": "m", "generation_config": "vllm"}]}).hint


DOCUMENTED = (Path(__file__).resolve().parents[3] / "docs" / "configuration.md").read_text()
ENGINES = {"portable": PortableSpec, "fake": FakeSpec, "trtllm": TrtllmSpec}
#: Every setting of every engine: (engine, key, default).
ENGINE_KEYS = [
    (kind, field.name, field.default)
    for kind, options in (("portable", PortableOptions), ("fake", FakeOptions), ("trtllm", None))
    for struct in (CommonEngineSpec, options)
    if struct is not None
    for field in msgspec.structs.fields(struct)
]


def another(key: str, default: object) -> object:
    """A value that the setting may have and that is not its default."""
    other = {"dtype": "bf16", "wait": "spin", "device": "cuda", "load_format": "dummy", "quant": "int8", "block_size": 32}
    if key in other:
        return other[key]
    if isinstance(default, float):
        return default / 2
    return not default if isinstance(default, bool) else default + 1  # type: ignore[operator]


@pytest.mark.parametrize(("kind", "key", "default"), ENGINE_KEYS)
def test_every_setting_of_an_engine_is_configurable_shown_and_documented(kind: str, key: str, default: object) -> None:
    value = another(key, default)
    resolved = load({"models": [MODEL | {"engine": kind, key: value, "max_num_tokens": 512} | {key: value}]})
    (gang,) = decided(resolved.config.models[0], EIGHT_LARGE)
    spec = gang.engine
    assert type(spec) is ENGINES[kind]
    assert getattr(spec if hasattr(spec, key) else spec.options, key) == value
    assert [row.value for row in resolved.rows() if row.path == f"models[0].{key}"] == [value]
    assert settings()[key] == f"models[].{key}"
    assert f"`{key}`" in DOCUMENTED


def test_the_settings_of_an_engine_reach_it_under_every_replica() -> None:
    replicas = [{"name": "a"}, {"name": "b", "engine": "fake"}, {"name": "c", "engine": "trtllm", "device": "cuda"}]
    given = {"quant": "int8", "fake_step_ms": 3.0, "trtllm": {"poll_ms": 5}, "threads": 2, "replicas": replicas}
    a, b, c = (gang.engine for gang in decided(load({"models": [MODEL | given]}).config.models[0]))
    assert a == PortableSpec(threads=2, options=PortableOptions(quant="int8"))
    assert b == FakeSpec(threads=2, options=FakeOptions(fake_step_ms=3.0))
    assert c == TrtllmSpec(threads=2, device="cuda", dtype="bf16", options=TrtllmOptions(poll_ms=5))
