"""What no deployment file may bring past ``config``: numbers, texts and lists of any size, in any setting, under any spelling."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import bounds
from orchestrator.config import deployment_file as deployment
from tests.support.examples import examples
from workers.protocol.errors import ConfigError

#: Every setting that holds a number, as the structs have them.
PATHS = sorted(path for path in bounds.NUMBERS if "replicas[]" not in path)
VALUES = (
    st.floats(allow_nan=True, allow_infinity=True)
    | st.integers(-(1 << 300), 1 << 300)
    | st.sampled_from((math.inf, -math.inf, math.nan, -1, 0, 0.5, 1 << 31, 1 << 63, 65536, 1e300))
)


def tree_with(path: str, value: object) -> dict[str, Any]:
    tree: dict[str, Any] = {"models": [{"name": "m"}]}
    node, rest = (tree["models"][0], path.removeprefix("models[].")) if path.startswith("models[].") else (tree, path)
    *above, key = rest.split(".")
    for name in above:
        node = node.setdefault(name, {})
    node[key] = value
    return tree


@settings(max_examples=examples(300), deadline=None)
@given(path=st.sampled_from(PATHS), value=VALUES)
def test_a_number_is_within_its_bounds_or_refused_by_its_key(path: str, value: float) -> None:
    """And what is taken can be written for the other processes and read back."""
    try:
        config = deployment.load(tree_with(path, value)).config
    except ConfigError as error:
        assert path.rpartition(".")[2] in error.lines() and all("\n" not in line and len(line) < 300 for line in (error.what, error.why))
        assert error.exit_code == 3
    else:
        low, high = bounds.NUMBERS[path]
        assert low <= value <= high
        assert msgspec.json.decode(msgspec.json.encode(config), type=deployment.Config) == config


def test_every_number_of_a_deployment_has_bounds() -> None:
    """The whole tree of defaults, with every setting in it, passes: none is missing in the table, and none is there for nothing."""
    replica = {"name": "r", "tp_size": 1, "pp_size": 1}
    tree = deployment.as_tree(deployment.load({"models": [{"name": "m"}, {"name": "n", "replicas": [replica]}]}).config)
    seen = set()

    def numbers(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                numbers(item, f"{path}.{key}".lstrip("."))
        elif isinstance(value, list | tuple):
            for item in value:
                numbers(item, f"{path}[]")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            seen.add(path)

    numbers(tree, "")
    # Numbers that are ``auto`` until they are given.
    assert seen | {"models[].tp_size", "models[].max_batch_size", "models[].max_num_tokens"} == set(bounds.NUMBERS)


@pytest.mark.parametrize(
    "path", ["name", "run_dir", "http.host", "models[].path", "models[].aliases", "http.allowed_origins", "tracing.endpoint"]
)
@pytest.mark.parametrize("text", ["x" * 100_000, "x\x00y", "x\ny", "\x7f"])
def test_texts_have_an_end_and_no_control_characters(path: str, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        deployment.load(tree_with(path, [text] if path.endswith(("aliases", "origins")) else text))
    assert path.rpartition(".")[2] in refused.value.what and all(len(line) < 8192 for line in refused.value.lines().splitlines())


def test_lists_have_an_end() -> None:
    with pytest.raises(ConfigError, match="aliases: a list of 5000 entries"):
        deployment.load(tree_with("models[].aliases", [f"a{index}" for index in range(5000)]))


@pytest.mark.parametrize("server", ["rpc", "back", "metrics"])
@pytest.mark.parametrize(("routers", "port", "fits"), [(1, 65535, True), (2, 65535, False), (64, 65472, True), (64, 65473, False)])
def test_the_last_router_has_a_port_too(server: str, routers: int, port: int, fits: bool) -> None:
    tree = {"models": [{"name": "m"}], "routers": routers, server: {"host": "127.0.0.1", "port": port}}
    if fits:
        deployment.load(tree)
    else:
        with pytest.raises(ConfigError, match=f"{server}.port: {port} is too high for {routers} routers"):
            deployment.load(tree)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("hang_floor_s: 1:30", "base 60"), ("drain_grace_s: 1:30.5", "base 60"), ("hang_floor_s: .inf", "hang_floor_s: inf"),
        ("heartbeat_s: .nan", "heartbeat_s: nan"), ("http: {port: -.inf}", "http.port"), ("admission: {max_n: 0}", "admission.max_n: 0"),
        ("admission: {max_n: 0x7fffffffffffffffffff}", "admission.max_n"), ("drain_grace_s: -1", "drain_grace_s: -1"),
    ],
)  # fmt: skip
def test_spellings_of_yaml(tmp_path: Path, line: str, named: str) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(f"models: [{{name: m}}]\n{line}\n")
    with pytest.raises(ConfigError) as refused:
        deployment.load(file)
    assert named in refused.value.lines() and "deployment.yaml" in refused.value.lines()


def test_quoted_colons_stay_text(tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text('models: [{name: m, aliases: ["1:30"]}]\n')
    assert deployment.load(file).config.models[0].aliases == ("1:30",)
