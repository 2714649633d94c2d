"""`trireme build` and `trireme engines` on a faked builder that knows the published options only: what is passed, kept and refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator.cli.main import run
from tests.support.tiny_models import IM_END, tiny_model
from tests.support.trtllm_host import FAKES, checkpoint_of, engine_of, even_model, pretend
from workers.artifacts.convert import convert
from workers.engines.trtllm import build as building
from workers.engines.trtllm import node_probe
from workers.engines.trtllm.build_options import BuildOptions, from_flags, options
from workers.engines.trtllm.engine_dir import RECORD, read_engine_dir
from workers.protocol.errors import ArtifactError, ConfigError, EnvironmentFault
from workers.protocol.specs import Parallel, quant_of

CONTRACT = json.loads((FAKES.parent / "contracts" / "tensorrt_llm_api.json").read_text())
BUILDER = {flag.removeprefix("--"): option for option in CONTRACT["cli"]["trtllm-build"]["options"] for flag in option["flags"]}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    pretend(monkeypatch)
    return monkeypatch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("build"))


def cache_of(folder: Path) -> list[str]:
    return ["--cache-dir", str(folder / "cache")]


def test_every_option_is_one_of_the_builders() -> None:
    for option in options():
        published = BUILDER[option.name]
        assert bool(published.get("is_flag")) == (option.kind is bool), option.name
        if listed := published.get("choices"):
            assert set(option.choices) <= set(listed), option.name
        default = published["default"]
        assert isinstance(default, option.kind) or default is None or option.kind is bool, option.name
    plugins = CONTRACT["python"]["tensorrt_llm.plugin.PluginConfig"]["literals"]["gemm_plugin"]
    assert {option.name: option.choices for option in options()}["gemm_plugin"] == tuple(name for name in plugins if name)


def test_a_name_that_the_builder_has_not_is_refused_by_the_fake(host: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    words = [building.find_program(os.environ["PATH"]), "--checkpoint_dir", str(checkpoint), "--output_dir", str(tmp_path / "out")]
    ran = subprocess.run([*words, "--max_batchsize", "8"], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2 and "unrecognized arguments: --max_batchsize 8" in ran.stderr


def test_build_then_list_show_verify_rm(
    host: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "build",
        str(checkpoint),
        "--name",
        "tiny",
        "--max_batch_size",
        "16",
        "--max-num-tokens=512",
        "--fast-build",
        *cache_of(tmp_path),
    ]
    assert run(line) == 0
    told = capsys.readouterr()
    path = Path(told.out.strip())
    assert re.fullmatch(r"tiny-bf16-tp2-pp2-sm90-trtllm1\.2\.1-[0-9a-f]{8}", path.name)
    assert "Engine generation completed" in told.err and "4 engines" in told.err and "built in" in told.err

    engine = read_engine_dir(path)
    assert (engine.parallel, engine.version, engine.max_batch_size, engine.max_num_tokens) == (Parallel(tp=2, pp=2), "1.2.1", 16, 512)
    assert (engine.max_seq_len, engine.max_input_len, engine.paged_kv_cache, engine.eos_ids[0]) == (512, 512, True, IM_END)
    assert engine.tokenizer_dir == path and not (path / "model.cache").exists()
    record = engine.record
    assert record is not None and record.gpu.capability == "9.0" and record.versions["tensorrt_llm"] == "1.2.1"
    command = list(record.command[1:])
    assert command[command.index("--gemm_plugin") + 1] == "auto" and "--fast_build" in command and "--tp_size" not in command
    assert "Engine generation completed" in (path / "build.log").read_text()

    assert run(line) == 0  # the same once more
    assert "found, built before" in capsys.readouterr().err
    assert len(list(path.parent.iterdir())) == 1

    assert run(["engines", "list", *cache_of(tmp_path)]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[0] == path.name and row[1:3] == ["tiny", "bfloat16"] and row[-1] == "WHOLE"
    assert run(["engines", "show", "tiny-bf16", *cache_of(tmp_path)]) == 0
    assert "NVIDIA H100 80GB HBM3 (compute capability 9.0)" in capsys.readouterr().out
    assert run(["engines", "verify", "tiny", *cache_of(tmp_path)]) == 0
    assert "every file as it was built" in capsys.readouterr().out
    assert run(["engines", "rm", "tiny", *cache_of(tmp_path)]) == 2  # nobody to ask
    capsys.readouterr()
    assert run(["engines", "rm", "tiny", "--yes", *cache_of(tmp_path)]) == 0
    assert not list(path.parent.iterdir())


def test_keys_differ_where_engines_would(host: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    def key(path: Path = checkpoint, **given: object) -> str:
        where = os.environ["PATH"]
        return building.prepare(path, from_flags(given), model="tiny", path=where, facts=node_probe.probe(where, None)).key

    same = key()
    assert key(workers=4, log_level="verbose") == same  # how, not what
    other = checkpoint_of(tmp_path, seed=1)
    keys = {same, key(max_batch_size=8), key(use_fused_mlp="disable"), key(other)}
    host.setenv("TRIREME_FAKE_GPUS", '[["NVIDIA L40S", "8.9", 46068, 46000]]')
    assert "-sm89-" in key()
    assert len(keys | {key()}) == 5


def test_fp8_weights_are_passed_on_and_said_to_be_unproven(
    host: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = convert(even_model(tmp_path / "even"), tmp_path / "ck", parallel=Parallel(tp=2), quant=quant_of("fp8"), for_trtllm=True)
    assert run(["build", str(narrow), "--name", "narrow", *cache_of(tmp_path)]) == 0
    told = capsys.readouterr()
    path = Path(told.out.strip())
    assert path.name.startswith("narrow-fp8_per_channel_per_token-tp2-pp1-sm90")
    assert "warning: quantized weights in TensorRT-LLM checkpoints are unproven here" in told.err
    record = read_engine_dir(path).record
    assert record is not None and "--gemm_plugin" not in record.command


def test_the_builder_sees_no_world(host: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    names = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "RAY_LOCAL_WORLD_SIZE", "WORLD_SIZE", "tllm_mpi_size")
    for name in names:
        host.setenv(name, "7")
    host.setenv("TRIREME_FAKE_BUILD", f"env={tmp_path / 'env.json'}")
    engine_of(tmp_path, checkpoint)
    seen = json.loads((tmp_path / "env.json").read_text())
    assert not set(names) & seen.keys() and "PATH" in seen


@pytest.mark.parametrize(
    ("mode", "error", "why"),
    [
        ("fail", EnvironmentFault, "CUDA error: out of memory"),
        ("killed", EnvironmentFault, ""),
        ("version=1.2.0", ArtifactError, "its config.json says 1.2.0, asked for was 1.2.1"),
        ("limit", ArtifactError, "its config.json says 256, asked for was 512"),
        ("missing", ArtifactError, "tp=2 pp=2 needs 4 engines, 3 of them are there"),
    ],
)
def test_a_build_that_fails_leaves_nothing_but_its_log(
    mode: str, error: type[Exception], why: str, host: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    host.setenv("TRIREME_FAKE_BUILD", mode)
    with pytest.raises(error) as caught:
        engine_of(tmp_path, checkpoint)
    assert why in caught.value.why, caught.value.lines()  # type: ignore[attr-defined]
    assert caught.value.hint  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.iterdir()] in ([], ["engine.log"])
    host.delenv("TRIREME_FAKE_BUILD")
    engine_of(tmp_path, checkpoint)
    assert [path.name for path in tmp_path.iterdir() if path.name != "engine.log"] == ["engine"]


def test_a_build_that_hangs_is_ended_with_all_that_it_started(host: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    host.setenv("TRIREME_FAKE_BUILD", "hang")
    plan = building.prepare(
        checkpoint, BuildOptions(), model="tiny", path=os.environ["PATH"], facts=node_probe.probe(os.environ["PATH"], None)
    )
    heard: list[str] = []
    with pytest.raises(EnvironmentFault, match="did not end in"):
        building.build(plan, tmp_path / "engine", env=os.environ, on_line=heard.append, on_tick=lambda *tick: None, limit_s=3.0)
    assert heard[-1] == "hanging"  # its child ignores SIGTERM
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout.split()
    assert not left, left


def test_ctrl_c_and_sigterm_end_a_build(host: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    host.setenv("TRIREME_FAKE_BUILD", "hang")
    line = [sys.executable, "-m", "trireme", "build", str(checkpoint), *cache_of(tmp_path)]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as command:
        assert command.stderr is not None
        lines = iter(command.stderr.readline, "")
        assert any("hanging" in text for text in lines)
        command.send_signal(signal.SIGTERM)
        assert command.wait(60) == 130
    assert not [path for path in (tmp_path / "cache" / "engines").iterdir() if path.is_dir()]


def test_two_builds_of_one_key_make_one_engine(host: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    plan = building.prepare(
        checkpoint, BuildOptions(), model="tiny", path=os.environ["PATH"], facts=node_probe.probe(os.environ["PATH"], None)
    )
    made: list[bool] = []

    def work() -> None:
        _, fresh = building.build(plan, tmp_path / "engine", env=os.environ, on_line=lambda line: None, on_tick=lambda *tick: None)
        made.append(fresh)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(made) == [False, False, True]


def test_a_log_is_text_whatever_the_builder_writes(host: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    host.setenv("TRIREME_FAKE_BUILD", "noisy")
    plan = building.prepare(
        checkpoint, BuildOptions(), model="tiny", path=os.environ["PATH"], facts=node_probe.probe(os.environ["PATH"], None)
    )
    heard: list[str] = []
    building.build(plan, tmp_path / "engine", env=os.environ, on_line=heard.append, on_tick=lambda *tick: None)
    assert "Loading weights: 10%" in heard and "Loading weights: 100%" in heard and any("not text" in line for line in heard)


def test_other_folders_are_never_overwritten(host: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "thesis.txt").write_text("three years of work")
    with pytest.raises(ArtifactError, match="is not an engine"):
        engine_of(tmp_path, checkpoint)
    assert (tmp_path / "engine" / "thesis.txt").exists()


def test_what_is_not_a_checkpoint_for_it_is_refused(host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(path: Path, error: type[Exception]) -> str:
        with pytest.raises(error) as caught:
            building.open_checkpoint(path)
        return str(caught.value.lines())  # type: ignore[attr-defined]

    uneven = convert(tiny_model(tmp_path / "uneven"), tmp_path / "ck2", parallel=Parallel(tp=2))
    assert "TensorRT-LLM needs tp to divide 3 KV heads" in refused(uneven, ConfigError)
    tied = convert(even_model(tmp_path / "even"), tmp_path / "ck1", parallel=Parallel(tp=2))
    assert "--for-trtllm" in refused(tied, ArtifactError)
    assert "trireme convert" in refused(tmp_path / "even", ArtifactError)
    packed = convert(tmp_path / "even", tmp_path / "ck3", parallel=Parallel(tp=2), dtype="bf16", quant=quant_of("int8"))
    assert "W8A16" in refused(packed, ConfigError)
    assert "is an engine already" in refused(engine_of(tmp_path, checkpoint_of(tmp_path)).path, ArtifactError)


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (["--max-seq-len", "1024"], 3, "--max-seq-len 1024 is too long"),
        (["--max-batch-size", "0"], 3, "--max-batch-size 0 is not possible"),
        (["--max-num-tokens", "8"], 3, "below --max-batch-size"),
        (["--gemm-plugin", "int4"], 3, "use auto, float16"),
        (["--opt-num-tokens", "64", "--multiple-profiles", "enable"], 3, "exclude each other"),
        (["--max-draft-len", "4"], 3, "go together"),
        (["--max-batch-siz", "4"], 2, "max-batch-size"),
        (["--tp-size", "2"], 2, "--tp-size"),
    ],
)
def test_options_are_refused_by_name(
    line: list[str], code: int, told: str, host: pytest.MonkeyPatch, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", str(checkpoint), "--dry-run", *line]) == code
    assert told in capsys.readouterr().err


def test_a_machine_without_it_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", str(checkpoint), "--dry-run", "--max-batch-size", "8"]) == 0  # needs neither GPU nor builder
    words = capsys.readouterr().out.split()
    assert words[:2] == ["trtllm-build", "--checkpoint_dir"] and words[words.index("--max_batch_size") + 1] == "8"
    monkeypatch.setenv("PATH", str(FAKES / "none"))
    assert run(["build", str(checkpoint)]) == 4
    assert "trtllm-build is not on PATH" in capsys.readouterr().err
    pretend(monkeypatch)
    monkeypatch.setenv("TRIREME_FAKE_GPUS", "[]")
    assert run(["build", str(checkpoint)]) == 4
    assert "there is no GPU to build for" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_built(host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    shard = checkpoint / "rank1.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"rank1\.safetensors is damaged"):
        engine_of(tmp_path, checkpoint)


def test_a_damaged_engine_is_named(host: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = engine_of(tmp_path, checkpoint, target="cache/engines/tiny").path
    engine = path / "rank2.engine"
    engine.write_bytes(bytes(engine.stat().st_size))
    assert run(["engines", "verify", str(path)]) == 3
    assert "rank2.engine is damaged" in capsys.readouterr().err
    engine.write_bytes(b"short")
    assert run(["engines", "show", str(path)]) == 3
    assert "rank2.engine has another size" in capsys.readouterr().err
    config = json.loads((path / "config.json").read_text())
    config["build_config"]["max_batch_size"] = 512
    (path / "config.json").write_text(json.dumps(config))
    assert run(["engines", "show", str(path)]) == 3
    assert "config.json is not the one of its build" in capsys.readouterr().err
    (path / "config.json").write_text("{")
    assert run(["engines", "list", *cache_of(tmp_path)]) == 0
    assert capsys.readouterr().out.split()[-1] == "DAMAGED"
    assert run(["engines", "rm", "tiny", "--yes", *cache_of(tmp_path)]) == 0 and not path.exists()


def test_an_engine_without_a_record_is_read_and_said_to_be_foreign(
    host: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = engine_of(tmp_path, checkpoint, target="cache/engines/foreign").path
    (path / RECORD).unlink()
    assert read_engine_dir(path).eos_ids[0] == IM_END  # from generation_config.json beside it
    assert run(["engines", "list", *cache_of(tmp_path)]) == 0
    assert capsys.readouterr().out.split()[-1] == "FOREIGN"
    assert run(["engines", "verify", "foreign", *cache_of(tmp_path)]) == 0
    assert "has no record of its build" in capsys.readouterr().out
