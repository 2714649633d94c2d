"""The `trireme` command: spelling, exit codes, cost of starting, and the commands on models, run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from orchestrator.cli import entry, main
from orchestrator.cli.extras import missing_package
from orchestrator.cli.main import COMMANDS, app, normalise, run, settings
from orchestrator.cli.model_options import dtype_of
from orchestrator.files import SHIPPED
from tests.support.tiny_models import tiny_model
from workers.protocol.errors import EnvironmentFault, Rejected


@pytest.mark.parametrize(
    ("typed", "means"),
    [
        ("serve M --tp_size 2 --max_num_tokens=64", "serve M --tp-size 2 --max-num-tokens=64"),
        ("serve M -tp 2 -pp=3", "serve M --tp-size 2 --pp-size=3"),
        ("status --debug -o wide --log_format json", "--debug --log-format json status -o wide"),
        ("up a_file.yaml --log-format=json", "--log-format=json up a_file.yaml"),
        ("chat -- --keep_this -tp", "chat -- --keep_this -tp"),
        ("pull --log-format", "--log-format pull"),
    ],
)
def test_one_spelling(typed: str, means: str) -> None:
    assert normalise(typed.split()) == means.split()


def test_a_value_is_never_respelled() -> None:
    assert normalise(["serve", "--served-model-name=a_b", "c_d"]) == ["serve", "--served-model-name=a_b", "c_d"]


def test_global_flags_are_read_wherever_they_stood() -> None:
    told = settings(normalise(["status", "--quiet", "--log-format", "json"]))
    assert (told.quiet, told.log_format, told.debug) == (True, "json", False)
    assert settings(["status"]).log_format == "text"
    with pytest.raises(Rejected, match="xml"):
        settings(["--log-format", "xml", "status"])


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (["pull", "no-such-model"], 2, "error: there is no model named 'no-such-model'"),
        (["pull", "--no-such-flag"], 2, "hint: trireme pull --help"),
        (["doctr"], 2, "Did you mean 'doctor'"),
        (["inspect", "/no/such/folder"], 3, "error: there is no model at /no/such/folder"),
        (["chat", "hello", "--url", "http://127.0.0.1:9"], 4, "error: nothing answers at http://127.0.0.1:9"),
        (["chat", "", "--url", "http://127.0.0.1:9"], 4, "error: "),
        (["--log-format", "xml", "version"], 2, "hint: use text or json"),
    ],
)
def test_the_exit_code_is_the_class_of_the_error(line: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == code
    output = capsys.readouterr()
    assert told in output.err and output.out == ""
    assert "Traceback" not in output.err


def test_what_was_not_foreseen_is_an_error_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("orchestrator.model_store.pull", lambda *_: 1 // 0)
    assert run(["pull"]) == 1
    assert "unexpected ZeroDivisionError" in (plain := capsys.readouterr().err) and "Traceback" not in plain
    assert run(["pull", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


#: What none of the lines below has a use for: engines, clusters, HTTP, sockets, arrays, YAML, drawing.
HEAVY = {"torch", "ray", "mpi4py", "zmq", "httpx", "numpy", "starlette", "uvicorn", "tokenizers", "asyncio", "yaml", "psutil", "rich"}


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (["--help"], 0, "doctor"),
        (["serve", "--help"], 0, "--replicas"),
        (["status"], 2, "no deployment runs"),
        (["status", "--no-such-flag"], 2, "--no-such-flag"),
        (["logs"], 2, "there are no logs"),
        (["no-such-command"], 2, "no-such-command"),
        (["version"], 0, "trireme"),
    ],
)
def test_a_start_imports_only_what_its_line_needs(line: list[str], code: int, told: str, tmp_path: Path) -> None:
    """The time of a start is that of its imports."""
    script = "import sys; from orchestrator.cli.main import run; code = run(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    ran = subprocess.run(
        [sys.executable, "-c", script, *line], capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"TRIREME_RUN_DIR": str(tmp_path)},
    )  # fmt: skip
    assert ran.returncode == code and told in ran.stdout + ran.stderr
    loaded = set(ran.stdout.splitlines()[-1].split())
    assert not loaded & HEAVY
    modules = {name for name in COMMANDS if f"orchestrator.cli.{name}" in loaded}
    assert modules == set(COMMANDS) if line == ["--help"] else modules <= {line[0]}


def test_convert_then_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_model(tmp_path / "tiny")
    target = tmp_path / "tp2"
    assert run(["convert", str(source), "-o", str(target), "-tp", "2", "--dtype", "bfloat16"]) == 0
    assert "tp=2 pp=1, 2 shards" in capsys.readouterr().err
    assert sorted(path.name for path in target.glob("rank*")) == ["rank0.safetensors", "rank1.safetensors"]

    assert run(["inspect", str(target), "--verify", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["parallel"], found["dtype"], found["runs"], found["verified"]) == (
        {"tp": 2, "pp": 1, "expert_parallel": False},
        "bf16",
        True,
        True,
    )

    assert run(["inspect", str(target), "--pp_size", "2"]) == 3
    output = capsys.readouterr()
    assert "checkpoint for tp=2 pp=1" in output.out
    assert f"hint: trireme convert {target} -tp 1 -pp 2 -o DIR" in output.err


def test_convert_quantizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tiny_model(tmp_path / "tiny", hidden=64, heads=2, kv_heads=1, head_dim=32), tmp_path / "ck"
    assert run(["convert", str(source), "-o", str(target), "--quant", "int4", "--group_size", "32"]) == 0
    assert "int4 (W4A16) in groups of 32, the rest fp32" in capsys.readouterr().err
    assert run(["inspect", str(target), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["quant"]["group_size"] == 32
    for flags, hint in ((["int2"], "use int8, int4, fp8"), (["int8", "--group-size", "32"], "leave the group size out")):
        assert run(["convert", str(source), "-o", str(target), "--quant", *flags]) != 0
        assert hint in capsys.readouterr().err
    assert run(["convert", str(source), "-o", str(target), "--group-size", "32"]) == 2
    assert "add --quant int4" in capsys.readouterr().err


def test_a_damaged_shard_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "whole"
    assert run(["convert", str(tiny_model(tmp_path / "tiny")), "-o", str(target)]) == 0
    shard = target / "rank0.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert run(["inspect", str(target), "--verify"]) == 3
    assert "rank0.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "means"), [("", None), ("auto", None), ("bf16", "bf16"), ("bfloat16", "bf16"), ("half", "fp16")])
def test_number_formats(name: str, means: str | None) -> None:
    assert dtype_of(name) == means


def test_an_unknown_number_format_is_refused() -> None:
    with pytest.raises(Rejected, match="int3"):
        dtype_of("int3")


DEPLOYMENT = """
name: small
models:
  - name: tiny
    engine: fake
    replicas: 2
"""


def test_config_show_tells_where_a_value_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(DEPLOYMENT)
    monkeypatch.setenv("TRIREME_MAX_BATCH_SIZE", "8")
    assert run(["config", "show", str(file), "--resolved"]) == 0
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["name"] == ['"small"', f"file {file}"]
    assert rows["models[0].max_batch_size"] == ["8", "environment TRIREME_MAX_BATCH_SIZE"]
    assert rows["http.port"] == ["8000", "default"]


def test_an_unknown_key_is_told_with_its_neighbour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(DEPLOYMENT.replace("engine", "engin"))
    for line in (["config", "show", str(file)], ["up", str(file)]):
        assert run(line) == 3
        told = capsys.readouterr().err
        assert "models[0].engin" in told and "did you mean engine" in told


def test_each_command_is_in_the_module_of_its_name() -> None:
    modules = {path.stem for path in Path(main.__file__).parent.glob("*.py")}
    assert set(COMMANDS) <= modules
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert list(commands) == list(COMMANDS)
    assert {name: command.name for name, command in commands.items()} == {name: name for name in COMMANDS}
    assert not any(command.hidden for command in commands.values())


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """None in sys.modules: Python then says that the module cannot be found."""
    for package, extra in (("yaml", "server"), ("opentelemetry.sdk", "otel"), ("ray", "ray")):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            patched.setattr("orchestrator.model_store.pull", lambda *_, package=package: __import__(package))
            assert run(["pull"]) == EnvironmentFault.exit_code
        told = capsys.readouterr().err.splitlines()
        assert told[0] == f"error: {package.partition('.')[0]} is not installed" and told[-1] == f"hint: pip install 'trireme-llm[{extra}]'"
    assert missing_package(ModuleNotFoundError("x", name="orchestrator.nothing")) is None, "a defect of ours is not dressed up"


def test_where_the_client_alone_is_installed_the_command_says_what_to_install() -> None:
    script = "import sys; sys.modules['typer'] = None; from orchestrator.cli.entry import main; main()"
    ran = subprocess.run([sys.executable, "-c", script, "status"], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (EnvironmentFault.exit_code, "")
    assert ran.stderr.splitlines()[0] == "error: typer is not installed" and "pip install 'trireme-llm[server]'" in ran.stderr


def test_the_shipped_files_can_be_had_without_a_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "examples", str(tmp_path)]) == 0
    listed = capsys.readouterr().out.split()
    assert str(tmp_path / "deploy" / "examples" / "local.yaml") in listed
    for file in listed:
        assert run(["config", "show", file]) == 0
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")) == sorted(
        path.relative_to(SHIPPED.resolve().parent) for path in SHIPPED.resolve().rglob("*.*")
    )
    capsys.readouterr()
    assert run(["config", "examples", str(tmp_path)]) == 2
    assert "deploy is there already" in capsys.readouterr().err


def test_a_group_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for line, told in ((["keys"], "client  Make a CURVE key pair"), ([], "serve     Serve one model")):
        assert run(line) == 2
        output = capsys.readouterr()
        assert told in output.out and not output.err


class InterruptedImport:
    """Ctrl-C while a module is imported."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "orchestrator.cli.main":
            raise KeyboardInterrupt


def test_ctrl_c_needs_no_stack_trace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """While the command is imported, and while it runs."""
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "orchestrator.cli.main")
        patch.setattr(sys, "meta_path", [InterruptedImport(), *sys.meta_path])
        with pytest.raises(SystemExit) as ended:
            entry.main()
    assert (ended.value.code, capsys.readouterr()) == (130, ("", ""))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "app", interrupted)
    assert (run(["status"]), capsys.readouterr()) == (130, ("", "interrupted\n"))
