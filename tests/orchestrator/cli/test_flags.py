"""Every flag of every command reaches the command's parameter, and those of a deployment its configuration."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from orchestrator.cli import other_servers
from orchestrator.cli.console import Console, ConsoleSettings
from orchestrator.cli.main import GLOBAL, SHORT, UsageError, app, known_elsewhere, normalise, run
from orchestrator.config.deployment_file import Config, Resolved, settings
from workers import __version__


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, command) of every command, those of groups too."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


GROUP: Any = typer.main.get_command(app)
COMMANDS = dict(commands(GROUP))


def invoke(words: tuple[str, ...], argv: list[str]) -> None:
    """Run one command as `run` does, without making the whole parser again."""
    line = normalise([words[-1], *argv])
    command = COMMANDS[words]
    command.invoke(command.make_context(words[-1], line[1:], obj=Console(ConsoleSettings())))


def complaint(command: Any, argv: list[str]) -> Exception:
    """What the parser says of a line."""
    with pytest.raises(UsageError) as caught:
        command.invoke(command.make_context("trireme", argv, obj=Console(ConsoleSettings())))
    return caught.value


def options(command: Any) -> list[Any]:
    return [each for each in command.params if hasattr(each, "is_flag")]


FLAGS = [
    (words, flag) for words, command in COMMANDS.items() for option in options(command) for flag in (*option.opts, *option.secondary_opts)
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_flag_of_a_command_reaches_its_parameter(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    for option in options(command):
        needed = ["3" for each in command.params if each not in options(command) and each.required]
        for each in options(command):
            if each.required and each is not option:
                needed += [each.opts[0], "3"]
        for flag in (*option.opts, *option.secondary_opts):
            if flag in ("--help", "-h"):
                continue
            value = [] if option.is_flag else ["3"]
            read = command.make_context(words[-1], [*needed, flag, *value]).params[option.name]
            if option.is_flag:
                assert read is (flag in option.opts), flag
            else:
                assert str(read[0] if isinstance(read, (list, tuple)) else read) in ("3", "3.0"), flag


def test_every_parameter_of_a_command_that_is_an_option_is_taken_by_it() -> None:
    """What the parser hands over is what the function asks for: no flag is read and dropped on the way."""
    for words, command in COMMANDS.items():
        taken = inspect.signature(command.callback).parameters
        unknown = {each.name for each in command.params if each.name != "help"} - set(taken)
        assert not unknown, (words, unknown)


#: Of each setting that is a flag of a command: what is typed, and what the configuration then says.
TYPED: dict[str, tuple[str, object]] = {
    "tp_size": ("3", 3), "pp_size": ("2", 2), "replicas": ("3", 3), "device": ("cuda", "cuda"), "dtype": ("bfloat16", "bf16"),
    "quant": ("int8", "int8"), "load_format": ("dummy", "dummy"), "tokenizer": ("/t", "/t"), "max_seq_len": ("99", 99),
    "max_batch_size": ("7", 7), "max_num_tokens": ("77", 77), "gpu_memory_utilization": ("0.5", 0.5), "kv_tokens": ("4096", 4096),
    "kv_bytes": ("123456", 123456), "block_size": ("32", 32), "prefix_cache": ("false", False), "threads": ("2", 2),
    "engine": ("fake", "fake"), "host": ("::1", "::1"), "port": ("8123", 8123), "api_keys_file": ("/k.json", "/k.json"),
    "insecure_http_without_keys": ("", True), "expert_parallel": ("", True),
    "insecure_http_without_tls": ("", True), "routers": ("3", 3), "launcher": ("ray", "ray"), "name": ("other", "other"),
    "run_dir": ("/run/x", "/run/x"), "cache_dir": ("/cache/x", "/cache/x"), "join_file": ("/j.json", "/j.json"),
    "join_key_file": ("/p.json", "/p.json"), "chat_template": ("/t.jinja", "/t.jinja"), "generation_config": ("none", "none"),
    "allowed_origins": ("https://a.b", ("https://a.b",)),
}  # fmt: skip
#: Options of these commands that are no setting: of the model's name, and of how the command itself behaves.
NO_SETTINGS = {"served_model_name", "revision", "detach", "help"}
DEPLOYMENT_COMMANDS = ("serve", "up", "router")


def deployment_flags() -> Iterator[tuple[str, str]]:
    for name in DEPLOYMENT_COMMANDS:
        yield from ((name, option.name) for option in options(COMMANDS[name,]) if option.name not in NO_SETTINGS)


@pytest.mark.parametrize(("command", "setting"), list(deployment_flags()))
def test_every_flag_of_a_deployment_reaches_its_configuration(
    command: str, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosted: list[Config] = []
    module = importlib.import_module(f"orchestrator.cli.{command}")
    monkeypatch.setattr(module, "host_or_detach", lambda console, config, *_, **__: hosted.append(config))
    assert setting in TYPED, f"--{setting} is new: say in TYPED what the configuration makes of it"
    typed, value = TYPED[setting]
    flag = f"--{setting.replace('_', '-')}"
    file = tmp_path / "d.yaml"
    file.write_text("models: [{name: m}]\nhttp: {port: 8000}\njoin: {file: /a.json, key_file: /b.json}\n")
    invoke((command,), ["m" if command == "serve" else str(file), flag, *([typed] if typed else [])])
    (config,) = hosted
    path = settings()[setting].replace("models[]", "models[0]")
    assert [row.value for row in Resolved(config=config, sources={}).rows() if row.path == path] == [value]


def test_a_name_and_a_revision_are_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    hosted: list[Config] = []
    monkeypatch.setattr("orchestrator.cli.serve.host_or_detach", lambda console, config, *_, **__: hosted.append(config))
    invoke(("serve",), ["org/model", "--revision", "v1", "--served-model-name", "other"])
    assert (hosted[0].models[0].path, hosted[0].models[0].name) == ("org/model@v1", "other")


@pytest.mark.parametrize("other", other_servers.SPELLINGS)
def test_a_flag_of_another_server_is_read_as_ours(other: str) -> None:
    ours = normalise(["serve", "m", other])[2].partition("=")[0]
    assert ours in {flag for words, flag in FLAGS if words == ("serve",)}
    assert other not in {flag for _, flag in FLAGS}


def test_what_others_call_layout_and_limits_means_the_same_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of vLLM's and one of trtllm-serve's, as people paste them."""
    hosted: list[Config] = []
    monkeypatch.setattr("orchestrator.cli.serve.host_or_detach", lambda console, config, *_, **__: hosted.append(config))
    vllm_line = (
        "--tensor-parallel-size 2 --pipeline-parallel-size 2 --data-parallel-size 2 --dtype half --max-model-len 512 --max-num-seqs 8"
        " --max-num-batched-tokens 64 --gpu-memory-utilization 0.9 --enable-prefix-caching --quantization fp8 --served-model-name n"
        " --download-dir /c --block-size 16 --host 127.0.0.1 --port 1"
    )
    trtllm_line = "--tp_size 4 --pp_size 1 --max_batch_size 8 --max_num_tokens 64 --max_seq_len 512 --host ::1"
    for line in (vllm_line, trtllm_line):
        assert run(["serve", "m", *line.split()]) == 0
    vllm, trtllm = (config.models[0] for config in hosted)
    assert (vllm.name, vllm.tp_size, vllm.pp_size, vllm.replicas, vllm.settings.dtype) == ("n", 2, 2, 2, "fp16")
    assert (vllm.settings.max_seq_len, vllm.settings.max_batch_size, vllm.settings.max_num_tokens) == (512, 8, 64)
    assert (vllm.settings.portable.quant, vllm.settings.portable.gpu_memory_utilization, vllm.settings.prefix_cache) == ("fp8", 0.9, True)
    assert (trtllm.tp_size, trtllm.settings.max_batch_size, trtllm.settings.max_seq_len) == (4, 8, 512)


@pytest.mark.parametrize("flag", other_servers.FLAGS)
def test_a_flag_that_means_nothing_here_is_refused_with_what_to_do(flag: str) -> None:
    assert flag not in {each for words, each in FLAGS if words in (("serve",), ("up",))} | set(GLOBAL) | set(SHORT)
    line = normalise(["serve", "m", flag.replace("-", "_").replace("__", "--", 1), "x"])
    assert known_elsewhere(complaint(GROUP, line)) == other_servers.FLAGS[flag]


@pytest.mark.parametrize("word", other_servers.COMMANDS)
def test_a_command_of_another_tool_is_refused_with_ours(word: str) -> None:
    names = {words[0] for words in COMMANDS}
    assert word not in names
    hint = known_elsewhere(complaint(GROUP, [word]))
    assert hint == other_servers.COMMANDS[word]
    assert {each.split()[0].rstrip(",") for each in hint.split("trireme ")[1:]} <= names


def test_the_hint_is_what_the_terminal_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "m", "--trust_remote_code"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: No such option: --trust-remote-code", f"hint: {other_servers.FLAGS['--trust-remote-code']}",
    ]  # fmt: skip
    assert run(["ps"]) == 2 and "hint: trireme status\n" in capsys.readouterr().err


def test_unknown_words_get_the_help_and_no_guess(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["frobnicate"]) == 2 and "hint: trireme --help" in capsys.readouterr().err
    assert run(["serve", "m", "--frobnicate"]) == 2 and "hint: trireme serve --help" in capsys.readouterr().err


def test_the_version_is_a_flag_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0 and capsys.readouterr().out == f"trireme {__version__}\n"
